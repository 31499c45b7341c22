"""Gradients of an outer loss with respect to hyperparameters, through the inner optimization. torch only."""

from lightning_nested.hypergradient.check import HypergradientReport, check_hypergradient
from lightning_nested.hypergradient.evaluation_point import Current, EvaluationPoint, LookAhead
from lightning_nested.hypergradient.implicit import ImplicitResult, implicit_hypergradient, implicit_result
from lightning_nested.hypergradient.influence import influence
from lightning_nested.hypergradient.inner_curvature import Curvature, FiniteDifference, GaussNewton, Hessian
from lightning_nested.hypergradient.remaining import Remaining
from lightning_nested.hypergradient.retraining import Minimize, Unroll
from lightning_nested.hypergradient.self_check import ProductCheck, check_products
from lightning_nested.hypergradient.unrolled import unrolled_hypergradient
from lightning_nested.linalg.curvature import FiniteDifferenceOperator, GaussNewtonOperator, HessianOperator
from lightning_nested.linalg.graph import DoubleBackwardError
from lightning_nested.linalg.kronecker import KroneckerFisher
from lightning_nested.linalg.operators import AveragedOperator, DiagonalOperator, LinearOperator
from lightning_nested.linalg.solvers.base import InverseSolver, Solution, SolverState
from lightning_nested.linalg.solvers.conjugate_gradient import ConjugateGradient
from lightning_nested.linalg.solvers.dense import DenseSolve
from lightning_nested.linalg.solvers.from_run import AdamDiagonal, KroneckerFactored
from lightning_nested.linalg.solvers.given import GivenInverse, Identity
from lightning_nested.linalg.solvers.neumann import Neumann
from lightning_nested.linalg.solvers.nystrom import Nystrom

__all__ = [
    "AdamDiagonal",
    "AveragedOperator",
    "ConjugateGradient",
    "Current",
    "Curvature",
    "DenseSolve",
    "DiagonalOperator",
    "DoubleBackwardError",
    "EvaluationPoint",
    "FiniteDifference",
    "FiniteDifferenceOperator",
    "GaussNewton",
    "GaussNewtonOperator",
    "GivenInverse",
    "Hessian",
    "HessianOperator",
    "HypergradientReport",
    "Identity",
    "ImplicitResult",
    "InverseSolver",
    "KroneckerFactored",
    "KroneckerFisher",
    "LinearOperator",
    "LookAhead",
    "Minimize",
    "Neumann",
    "Nystrom",
    "ProductCheck",
    "Remaining",
    "Solution",
    "SolverState",
    "Unroll",
    "check_hypergradient",
    "check_products",
    "implicit_hypergradient",
    "implicit_result",
    "influence",
    "unrolled_hypergradient",
]
