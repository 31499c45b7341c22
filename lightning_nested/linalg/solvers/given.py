"""Inverses that the user provides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_nested.linalg.operators import FlatOperator, LinearOperator, as_operator
from lightning_nested.linalg.solvers.base import (
    InverseSolver,
    Solution,
    SolverState,
    agreed_number,
    check_finite,
)
from lightning_nested.linalg.vectors import (
    Reduce,
    Vector,
    norm,
)


@dataclass(frozen=True, kw_only=True)
class GivenInverse(InverseSolver):
    """x = M b with an inverse that the user brings: any object with ``M @ v`` on a flat vector.

    A curvlinops K-FAC inverse, a matrix, a LinearOperator.
    """

    inverse: Any

    def _solve(
        self, operator: LinearOperator, b: Vector, size: float, state: SolverState, reduce: Reduce | None
    ) -> Solution:
        x = as_operator(self.inverse, b) @ b
        check_finite(agreed_number(norm(x), reduce), "The product with the given inverse")
        return Solution(x=x, residual=math.nan, iterations=0, status="truncated", state=state)


def as_solver(solver: InverseSolver | LinearOperator | FlatOperator) -> InverseSolver:
    """A solver as it is; any other object with ``@`` is taken as an approximate inverse."""
    return solver if isinstance(solver, InverseSolver) else GivenInverse(inverse=solver)
