"""Inverse-vector products x ≈ A⁻¹b from products with A: the solvers of implicit differentiation.

Each solver is a frozen strategy; what evolves between solves (a previous solution, a top eigenvector) is a
:class:`SolverState`. Numerical failure is never silent: a solve reports how it ended, and one that has no
meaningful answer raises ``FloatingPointError``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lightning_nested.linalg.finite import check_finite
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.processes import Reduce, agreed_number
from lightning_nested.linalg.saved import require_keys
from lightning_nested.linalg.shards import gathered, in_shards, shard_like
from lightning_nested.linalg.vectors import Vector, norm, zeros_like


@dataclass
class SolverState:
    """Warm start that one solve hands to the next."""

    solution: Vector | None = None
    eigenvector: Vector | None = None  # of the largest |eigenvalue|, by power iteration
    eigenvalue: float | None = None
    length: float | None = None  # of the move of products by differences
    sides: int = 2  # of these differences
    solves: int = 0  # with such products, so far

    def state_dict(self) -> dict[str, Any]:
        """Return whole tensors and numbers only, so that checkpoints load with ``weights_only=True``."""
        return {
            name: tuple(map(gathered, held)) if isinstance(held, tuple) else held
            for name, held in vars(self).items()
        }

    def placed(self, like: Vector) -> SolverState:
        """Return the state with vectors in shards where ``like`` is, as those of a checkpoint are not."""
        if not in_shards(like):
            return self

        def sharded(v: Vector | None) -> Vector | None:
            return None if v is None else tuple(map(shard_like, v, like))

        return replace(self, solution=sharded(self.solution), eigenvector=sharded(self.eigenvector))

    def load_state_dict(self, state: Mapping[str, Any], like: Vector) -> None:
        """Restore, on the devices of ``like``; the state of another number of tensors is dropped, for a cold start."""
        require_keys(state, ("solution", "eigenvector", "eigenvalue"), "the solver")
        vectors = [state["solution"], state["eigenvector"]]
        if any(v is not None and len(v) != len(like) for v in vectors):
            self.solution = self.eigenvector = self.eigenvalue = None
            return

        def placed(v: Vector | None) -> Vector | None:
            return None if v is None else tuple(a.to(p.device) for a, p in zip(v, like, strict=True))

        self.solution, self.eigenvector = (placed(v) for v in vectors)
        self.eigenvalue = state["eigenvalue"]
        # Earlier versions had central differences only, or none.
        self.length, self.solves = state.get("length"), state.get("solves", 0)
        self.sides = state.get("sides", 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """Result of a solve.

    ``status`` is ``"converged"``, ``"truncated"`` (stopped at the number of terms asked for) or
    ``"negative_curvature"`` (stopped where A is not positive). The state may hold the tensors of x: read, do not write.
    The residual of a truncated series is that before its last term, an upper bound while the series converges.
    """

    x: Vector  # approximate A⁻¹b
    residual: float  # ‖b − Ax‖/‖b‖; NaN where it is unknown (identity, a given inverse)
    iterations: int  # products with A, including those of a power iteration
    # Rayleigh quotient vᵀAv/vᵀv: the smallest met, for a series that of its last term, which leans to the smallest
    # eigenvalues; negative: A is indefinite. NaN when none was formed.
    curvature: float = math.nan
    status: str = "converged"
    state: SolverState = field(default_factory=SolverState)  # for the next solve


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearSystem:
    """A x = b with a finite b ≠ 0, on one or several processes."""

    operator: LinearOperator  # A
    b: Vector
    size: float  # ‖b‖ > 0
    state: SolverState  # of the previous solve
    reduce: Reduce | None  # averages a tensor over processes

    def number(self, value: Tensor) -> float:
        """Return a scalar that every process agrees on."""
        return agreed_number(value, self.reduce)

    def finite(self, value: Tensor, what: str) -> float:
        """Return a scalar that every process agrees on, or raise FloatingPointError if it is not finite."""
        return check_finite(self.number(value), what)


class RunStatistics(Protocol):
    """Approximate inverses of the inner curvature that a running training provides."""

    def kronecker_inverse(
        self, damping: float | None = None, relative: float | None = None
    ) -> LinearOperator:
        """Return the damped inverse of the Kronecker-factored Fisher information."""

    def diagonal_inverse(self, damping: float | None) -> LinearOperator:
        """Return the inverse of the diagonal in front of the inner optimizer's step."""


class InverseSolver(ABC):
    """Strategy for x ≈ A⁻¹b that needs only products with A.

    Attributes:
        needs_operator: False if A is never multiplied with, so that no graph of the inner loss is needed.
        needs_statistics: True if the solver must be bound to a running training, see :meth:`bind`.
    """

    needs_operator: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = False

    @property
    def products(self) -> int:
        """Products with A of one solve, at most: the cost that outer steps are planned with. Override it."""
        return 0

    def held(self, size: int) -> int:
        """Numbers that a solve for so many parameters holds at once, b and x among them. Override it."""
        return 2 * size

    def bind(self, statistics: RunStatistics) -> InverseSolver:
        """Return the solver for the present state of a training."""
        return self

    def solve(
        self,
        operator: LinearOperator,
        b: Vector,
        *,
        state: SolverState | None = None,
        reduce: Reduce | None = None,
    ) -> Solution:
        """Solve A x = b for a symmetric A, unless the solver says otherwise.

        Args:
            operator: A.
            b: Right-hand side, a tuple of tensors.
            state: State of the previous solve, for warm starts.
            reduce: Averages a tensor over processes; makes every decision the same everywhere.

        Raises:
            FloatingPointError: A non-finite value, a divergent series, or no direction of positive curvature.
        """
        size = check_finite(agreed_number(norm(b), reduce), "The norm of the right-hand side")
        state = state.placed(b) if state is not None else SolverState()
        if size == 0.0:
            zero = zeros_like(b)
            return Solution(x=zero, residual=0.0, iterations=0, state=replace(state, solution=zero))
        return self._solve(LinearSystem(operator=operator, b=b, size=size, state=state, reduce=reduce))

    @abstractmethod
    def _solve(self, system: LinearSystem) -> Solution: ...


def factorizable_dtype(dtype: torch.dtype) -> torch.dtype:
    """Promote to float32: torch has no half-precision factorizations."""
    return torch.promote_types(dtype, torch.float32)


def symmetrized(matrix: Tensor) -> Tensor:
    """Return (A + Aᵀ)/2."""
    return (matrix + matrix.T) / 2
