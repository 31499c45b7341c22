"""The identity in place of the inverse."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.solvers.base import InverseSolver, Solution, SolverState
from lightning_nested.linalg.vectors import (
    Reduce,
    Vector,
    clone,
)


@dataclass(frozen=True, kw_only=True)
class Identity(InverseSolver):
    """x = b, the inverse of the identity: T1-T2, also the zero-term series without its step size.

    Luketina, Berglund, Greff & Raiko (2016), ICML, PMLR 48:2952-2960.
    """

    def _solve(
        self, operator: LinearOperator, b: Vector, size: float, state: SolverState, reduce: Reduce | None
    ) -> Solution:
        return Solution(x=clone(b), residual=math.nan, iterations=0, status="truncated", state=state)
