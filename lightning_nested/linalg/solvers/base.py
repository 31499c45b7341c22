"""Inverse-vector products x ≈ A⁻¹b from products with A: the solvers of implicit differentiation.

Each solver is a frozen strategy; what evolves between solves (a previous solution, a top eigenvector) is a
:class:`SolverState`. Numerical failure is never silent: a solve reports how it ended, and one that has no
meaningful answer raises ``FloatingPointError``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.vectors import (
    Reduce,
    Vector,
    norm,
    zeros_like,
)


@dataclass
class SolverState:
    """What one solve hands to the next."""

    solution: Vector | None = None
    eigenvector: Vector | None = None  # of the largest |eigenvalue|, by power iteration
    eigenvalue: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, so that checkpoints load with ``weights_only=True``."""
        return {"solution": self.solution, "eigenvector": self.eigenvector, "eigenvalue": self.eigenvalue}

    def load_state_dict(self, state: dict[str, Any], like: Vector) -> None:
        """Restore, on the devices of ``like``."""

        def placed(v: Vector | None) -> Vector | None:
            return None if v is None else tuple(a.to(p.device) for a, p in zip(v, like, strict=True))

        self.solution, self.eigenvector = placed(state["solution"]), placed(state["eigenvector"])
        self.eigenvalue = state["eigenvalue"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """Result of a solve.

    Attributes:
        x: Approximate A⁻¹b, a tuple of tensors; the state may hold the same ones: read, do not write.
        residual: ‖b − Ax‖/‖b‖; for a truncated series the residual before its last term, an upper bound while
            the series converges; NaN where it is unknown (identity, a given inverse).
        iterations: Products with A, the ones of a power iteration included.
        curvature: Rayleigh quotient vᵀAv/vᵀv: the smallest met, for a series that of its last term, which leans to the
            smallest eigenvalues; negative: A is indefinite. NaN when none was formed.
        status: ``"converged"``, ``"truncated"`` (stopped at the number of terms asked for) or
            ``"negative_curvature"`` (stopped where A is not positive).
        state: To be given to the next solve.
    """

    x: Vector
    residual: float
    iterations: int
    curvature: float = math.nan
    status: str = "converged"
    state: SolverState = field(default_factory=SolverState)


def agreed_number(value: Tensor, reduce: Reduce | None) -> float:
    """A scalar every process agrees on, so that all take the same branch."""
    return float(value if reduce is None else reduce(value.reshape(1)))


def check_finite(value: float, what: str) -> float:
    """Return the value, or raise FloatingPointError if it is not finite."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{what} must be finite. Got {value}: the loss or its derivatives overflowed; lower the learning rates, "
            "add damping, or train in a wider precision."
        )
    return value


def check_positive(name: str, value: float | None, *, zero: bool = False) -> None:
    """Raise ValueError unless the value is positive, or None; ``zero=True`` allows 0."""
    if value is not None and not (value > 0 or (zero and value == 0)):
        raise ValueError(f"{name} must be {'non-negative' if zero else 'positive'}. Got {value}.")


class InverseSolver(ABC):
    """Strategy for x ≈ A⁻¹b that needs only products with A."""

    def solve(
        self,
        operator: LinearOperator,
        b: Vector,
        *,
        state: SolverState | None = None,
        reduce: Reduce | None = None,
    ) -> Solution:
        """Solve A x = b.

        Args:
            operator: A, symmetric unless the solver says otherwise.
            b: Right-hand side, a tuple of tensors.
            state: The state of the previous solve, for warm starts.
            reduce: Averages a tensor over processes; makes every decision the same everywhere.

        Raises:
            FloatingPointError: A non-finite value, a divergent series, or no direction of positive curvature.
        """
        size = check_finite(agreed_number(norm(b), reduce), "The norm of the right-hand side")
        state = state if state is not None else SolverState()
        if size == 0.0:
            zero = zeros_like(b)
            return Solution(x=zero, residual=0.0, iterations=0, state=with_solution(state, zero))
        return self._solve(operator, b, size, state, reduce)

    @abstractmethod
    def _solve(
        self, operator: LinearOperator, b: Vector, size: float, state: SolverState, reduce: Reduce | None
    ) -> Solution:
        """Solve for a finite b of norm ``size`` > 0."""


def factorizable_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of factorisations, which half precision does not have."""
    return torch.promote_types(dtype, torch.float32)


def symmetrized(matrix: Tensor) -> Tensor:
    """Return (A + Aᵀ)/2."""
    return (matrix + matrix.T) / 2


def with_solution(state: SolverState, x: Vector) -> SolverState:
    """Return the state with x as the start of the next solve."""
    return SolverState(x, state.eigenvector, state.eigenvalue)
