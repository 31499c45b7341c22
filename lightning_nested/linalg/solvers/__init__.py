"""Inverse solvers: strategies for x ≈ A⁻¹b that need only products with A."""

from lightning_nested.linalg.solvers.base import InverseSolver, Solution, SolverState
from lightning_nested.linalg.solvers.conjugate_gradient import ConjugateGradient
from lightning_nested.linalg.solvers.dense import DenseSolve
from lightning_nested.linalg.solvers.from_run import AdamDiagonal, KroneckerFactored
from lightning_nested.linalg.solvers.given import GivenInverse, Identity
from lightning_nested.linalg.solvers.neumann import Neumann
from lightning_nested.linalg.solvers.nystrom import Nystrom

__all__ = [
    "AdamDiagonal",
    "KroneckerFactored",
    "InverseSolver",
    "Solution",
    "SolverState",
    "ConjugateGradient",
    "DenseSolve",
    "GivenInverse",
    "Identity",
    "Neumann",
    "Nystrom",
]
