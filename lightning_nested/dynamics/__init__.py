"""Training as a dynamical system: Lyapunov exponents, the optimizer as a map, ridge riders. PyTorch only."""

from lightning_nested.dynamics.game_tracker import GameTracker
from lightning_nested.dynamics.lyapunov import (
    LyapunovSpectrum,
    kaplan_yorke_dimension,
    lyapunov_exponents,
    lyapunov_spectrum,
)
from lightning_nested.dynamics.maps import DifferentiableMap, rk4_step
from lightning_nested.dynamics.riders.branching import Branching
from lightning_nested.dynamics.riders.executors import InProcess, Processes, Ray
from lightning_nested.dynamics.riders.generalized_ridge_rider import GeneralizedRidgeRider
from lightning_nested.dynamics.riders.ridge_rider import RidgeRider
from lightning_nested.dynamics.riders.tree import Branch, RideTree, Solution
from lightning_nested.dynamics.tangents import Clip
from lightning_nested.dynamics.tracker import TrainingTracker
from lightning_nested.dynamics.update_map import UpdateMap, update_map
from lightning_nested.optim.update_rules import UpdateRule

__all__ = [
    "Branch",
    "Branching",
    "Clip",
    "DifferentiableMap",
    "GameTracker",
    "GeneralizedRidgeRider",
    "InProcess",
    "LyapunovSpectrum",
    "Processes",
    "Ray",
    "RideTree",
    "RidgeRider",
    "Solution",
    "TrainingTracker",
    "UpdateMap",
    "UpdateRule",
    "kaplan_yorke_dimension",
    "lyapunov_exponents",
    "lyapunov_spectrum",
    "rk4_step",
    "update_map",
]
