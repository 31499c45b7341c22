"""Gradients of an outer loss with respect to hyperparameters, through the inner optimization. torch only."""

from lightning_nested.hypergradient.check import HypergradientReport, check_hypergradient
from lightning_nested.hypergradient.curvature import (
    AveragedOperator,
    DiagonalOperator,
    DoubleBackwardError,
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    HessianOperator,
    LinearOperator,
)
from lightning_nested.hypergradient.implicit import (
    Curvature,
    FiniteDifference,
    GaussNewton,
    Hessian,
    ImplicitResult,
    implicit_hypergradient,
    implicit_result,
)
from lightning_nested.hypergradient.inverse import (
    ConjugateGradient,
    DenseSolve,
    GivenInverse,
    Identity,
    InverseSolver,
    Neumann,
    Nystrom,
    Solution,
    SolverState,
)
from lightning_nested.hypergradient.response import Minimize, Unroll
from lightning_nested.hypergradient.unrolled import unrolled_hypergradient

__all__ = [
    "AveragedOperator",
    "ConjugateGradient",
    "Curvature",
    "DenseSolve",
    "DiagonalOperator",
    "DoubleBackwardError",
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
    "LinearOperator",
    "Minimize",
    "Neumann",
    "Nystrom",
    "Solution",
    "SolverState",
    "Unroll",
    "check_hypergradient",
    "implicit_hypergradient",
    "implicit_result",
    "unrolled_hypergradient",
]
