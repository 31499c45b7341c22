"""Training as a dynamical system: Lyapunov exponents, the optimizer as a map, ridge riders. PyTorch only."""

from lightning_nested.dynamics.lyapunov import (
    LyapunovSpectrum,
    kaplan_yorke_dimension,
    lyapunov_exponents,
    lyapunov_spectrum,
)
from lightning_nested.dynamics.maps import DifferentiableMap, rk4_step
from lightning_nested.dynamics.update_map import UpdateMap, update_map
from lightning_nested.dynamics.update_rules import UpdateRule

__all__ = [
    "DifferentiableMap",
    "LyapunovSpectrum",
    "UpdateMap",
    "UpdateRule",
    "kaplan_yorke_dimension",
    "lyapunov_exponents",
    "lyapunov_spectrum",
    "rk4_step",
    "update_map",
]
