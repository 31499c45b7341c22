"""Conjugate gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from typing_extensions import override

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.linalg.operators import DiagonalOperator, LinearOperator, as_operator
from lightning_nested.linalg.solvers.base import InverseSolver, LinearSystem, Solution
from lightning_nested.linalg.vectors import Vector, add_, clone, dot, follow_, norm, zeros_like


@checked
@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(InverseSolver):
    """Conjugate gradient for symmetric positive A (+ damping·I); independent of any step size.

    Error in the A-norm falls by (√κ − 1)/(√κ + 1) an iteration. One product an iteration, four vectors.
    Stops at ‖r‖ ≤ tolerance·‖b‖, at the number of iterations, or at the first direction with pᵀAp ≤ 0, which it
    reports as ``"negative_curvature"`` (and raises if there is no progress to return).
    Hestenes & Stiefel (1952), J. Res. Natl. Bur. Stand. 49:409-436.

    Args:
        max_iterations: Largest number of products with A.
        tolerance: Relative residual to stop at.
        damping: Number added to the diagonal.
        preconditioner: Any object with ``M @ v`` on a flat vector (or a LinearOperator), an approximate inverse of A,
            positive definite.
        warm_start: Begin from the previous solution (one more product).
    """

    max_iterations: int = 20
    tolerance: float = 1e-6
    damping: float = 0.0
    preconditioner: Any = None
    warm_start: bool = False

    def __post_init__(self) -> None:
        positive(max_iterations=self.max_iterations)
        at_least(0, tolerance=self.tolerance)
        at_least(0, damping=self.damping)

    @override
    def held(self, size: int) -> int:
        # b, x, the residual, a direction and its product; the gradient with its graph; M times the residual.
        return (6 + self.warm_start + (self.preconditioner is not None)) * size

    @property
    def products(self) -> int:
        """Products with A of one solve, at most."""
        return self.max_iterations

    def _solve(self, system: LinearSystem) -> Solution:
        operator = system.operator + DiagonalOperator(self.damping) if self.damping else system.operator
        inverse = None if self.preconditioner is None else as_operator(self.preconditioner, system.b)
        x, r, products = self._start(system, operator)
        z = r if inverse is None else inverse @ r
        p = clone(z)
        rz, residual = system.number(dot(r, z)), system.number(norm(r))
        pp = rz if inverse is None else system.number(dot(p, p))
        curvature, status, stepped = math.nan, "truncated", False
        for _ in range(self.max_iterations):
            if residual <= self.tolerance * system.size or residual == 0.0:
                break
            if rz <= 0.0 or pp == 0.0:
                if inverse is None and stepped:  # the squares underflow
                    break
                self._refuse(rz, residual)
            q = operator @ p
            products += 1
            pq = system.finite(dot(p, q), "pᵀAp of conjugate gradient")
            curvature = pq / pp if math.isnan(curvature) else min(curvature, pq / pp)
            if pq <= 0.0:
                status = "negative_curvature"
                break
            step, stepped = rz / pq, True
            add_(x, p, alpha=step)
            add_(r, q, alpha=-step)
            z = r if inverse is None else inverse @ r
            rz, previous = system.number(dot(r, z)), rz
            residual = _residual(system, r, rz if inverse is None else None)
            follow_(p, rz / previous, z)
            # The step was such that r is orthogonal to the last p.
            pp = rz + (rz / previous) ** 2 * pp if inverse is None else system.number(dot(p, p))
        if residual <= self.tolerance * system.size:
            status = "converged"
        elif status == "negative_curvature" and not stepped:
            raise FloatingPointError(
                f"Conjugate gradient met pᵀAp ≤ 0 in its first direction. Got curvature {curvature:g}: the inner loss "
                "is not at a minimum. Raise damping, train further before the first outer step, or use GaussNewton()."
            )
        return Solution(
            x=x,
            residual=residual / system.size,
            iterations=products,
            curvature=curvature,
            status=status,
            state=replace(system.state, solution=x) if self.warm_start else system.state,
        )

    def _start(self, system: LinearSystem, operator: LinearOperator) -> tuple[Vector, Vector, int]:
        """Return the first x, its residual and the products spent."""
        previous = system.state.solution if self.warm_start else None
        if previous is None:
            return zeros_like(system.b), clone(system.b), 0
        r = add_(clone(system.b), operator @ previous, alpha=-1.0)
        if system.number(norm(r)) < system.size:
            return clone(previous), r, 1
        # The old solution is further away than zero.
        return zeros_like(system.b), clone(system.b), 1

    def _refuse(self, rz: float, residual: float) -> NoReturn:
        raise FloatingPointError(
            f"rᵀMr of conjugate gradient must be positive. Got {rz:g} at ‖r‖ = {residual:g}: "
            + (
                "the outer gradient is too small for its dtype; scale the outer loss."
                if self.preconditioner is None
                else "the preconditioner M is not positive definite; add damping to it."
            )
        )


def _residual(system: LinearSystem, r: Vector, square: float | None) -> float:
    """Return ‖r‖, by its square where that is known and far from the ends of the dtype's range."""
    ends = torch.finfo(r[0].dtype)
    if square is not None and ends.tiny / ends.eps**2 < square < ends.max:
        return math.sqrt(square)
    return system.finite(norm(r), "The residual of conjugate gradient")
