"""Gradients of an outer loss with respect to hyperparameters, through the inner optimization. torch only."""

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
    "Identity",
    "ImplicitResult",
    "InverseSolver",
    "LinearOperator",
    "Neumann",
    "Nystrom",
    "Solution",
    "SolverState",
    "implicit_hypergradient",
    "implicit_result",
]
