"""Inverses that need no product with A: the identity, and those that the user provides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from lightning_nested.arguments import checked
from lightning_nested.linalg.operators import FlatOperator, LinearOperator, as_operator
from lightning_nested.linalg.solvers.base import InverseSolver, LinearSystem, Solution
from lightning_nested.linalg.solvers.neumann import Neumann
from lightning_nested.linalg.vectors import clone, norm

AnySolver: TypeAlias = InverseSolver | LinearOperator | FlatOperator | None
"""A solver, an approximate inverse with ``@``, or None for ``Neumann()``."""


@dataclass(frozen=True, kw_only=True)
class Identity(InverseSolver):
    """x = b, the inverse of the identity: T1-T2, also the zero-term series without its step size.

    Luketina, Berglund, Greff & Raiko (2016), ICML, PMLR 48:2952-2960.
    """

    needs_operator: ClassVar[bool] = False

    def _solve(self, system: LinearSystem) -> Solution:
        x, unknown = clone(system.b), math.nan
        return Solution(x=x, residual=unknown, iterations=0, status="truncated", state=system.state)


@checked
@dataclass(frozen=True, kw_only=True)
class GivenInverse(InverseSolver):
    """x = M b with an inverse that the user brings: any object with ``M @ v`` on a flat vector.

    A curvlinops K-FAC inverse, a matrix, a LinearOperator.
    """

    inverse: Any

    needs_operator: ClassVar[bool] = False

    def _solve(self, system: LinearSystem) -> Solution:
        x = as_operator(self.inverse, system.b) @ system.b
        system.finite(norm(x), "The product with the given inverse")
        return Solution(x=x, residual=math.nan, iterations=0, status="truncated", state=system.state)


def as_solver(solver: AnySolver) -> InverseSolver:
    """Return a solver itself, ``Neumann()`` for None, any other object with ``@`` as an approximate inverse."""
    if solver is None:
        return Neumann()
    return solver if isinstance(solver, InverseSolver) else GivenInverse(inverse=solver)
