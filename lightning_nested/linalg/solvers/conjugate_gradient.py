"""Conjugate gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_nested.linalg.operators import DiagonalOperator, LinearOperator, as_operator
from lightning_nested.linalg.solvers.base import (
    InverseSolver,
    Solution,
    SolverState,
    agreed_number,
    check_finite,
    check_positive,
    with_solution,
)
from lightning_nested.linalg.vectors import (
    Reduce,
    Vector,
    add_,
    clone,
    dot,
    norm,
    scale_,
    zeros_like,
)


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(InverseSolver):
    """Conjugate gradient for symmetric positive A (+ damping·I); independent of any step size.

    Error in the A-norm falls by (√κ − 1)/(√κ + 1) an iteration. One product an iteration, four vectors.
    Stops at ‖r‖ ≤ tolerance·‖b‖, at the number of iterations, or at the first direction with pᵀAp ≤ 0, which it
    reports as ``"negative_curvature"`` (and raises if there is no progress to return).
    Hestenes & Stiefel (1952), J. Res. Natl. Bur. Stand. 49:409-436.

    Args:
        max_iterations: Products with A at most.
        tolerance: Relative residual to stop at.
        damping: Added to the diagonal.
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
        check_positive("max_iterations", self.max_iterations)
        check_positive("tolerance", self.tolerance, zero=True)
        check_positive("damping", self.damping, zero=True)

    def _solve(
        self, operator: LinearOperator, b: Vector, size: float, state: SolverState, reduce: Reduce | None
    ) -> Solution:
        if self.damping:
            operator = operator + DiagonalOperator(self.damping)
        inverse = None if self.preconditioner is None else as_operator(self.preconditioner, b)
        x, r, products, stepped = zeros_like(b), clone(b), 0, False
        if self.warm_start and state.solution is not None:
            add_(r, operator @ state.solution, alpha=-1.0)
            products = 1
            if agreed_number(norm(r), reduce) < size:
                x = clone(state.solution)
            else:  # the old solution is further away than zero
                r = clone(b)
        z = r if inverse is None else inverse @ r
        p = clone(z)
        rz = agreed_number(dot(r, z), reduce)
        residual = agreed_number(norm(r), reduce)
        curvature, status = math.nan, "truncated"
        for _ in range(self.max_iterations):
            if residual <= self.tolerance * size or residual == 0.0:
                break
            pp = agreed_number(dot(p, p), reduce)
            if rz <= 0.0 or pp == 0.0:
                if inverse is None and stepped:  # the squares underflow
                    break
                raise FloatingPointError(
                    f"rᵀMr of conjugate gradient must be positive. Got {rz:g} at ‖r‖ = {residual:g}: "
                    + (
                        "the outer gradient is too small for its dtype; scale the outer loss."
                        if inverse is None
                        else "the preconditioner M is not positive definite; add damping to it."
                    )
                )
            q = operator @ p
            products += 1
            pq = check_finite(agreed_number(dot(p, q), reduce), "pᵀAp of conjugate gradient")
            curvature = pq / pp if math.isnan(curvature) else min(curvature, pq / pp)
            if pq <= 0.0:
                status = "negative_curvature"
                break
            step, stepped = rz / pq, True
            add_(x, p, alpha=step)
            add_(r, q, alpha=-step)
            residual = check_finite(agreed_number(norm(r), reduce), "The residual of conjugate gradient")
            z = r if inverse is None else inverse @ r
            rz, previous = agreed_number(dot(r, z), reduce), rz
            scale_(p, rz / previous)
            add_(p, z)
        if residual <= self.tolerance * size:
            status = "converged"
        elif status == "negative_curvature" and not stepped:
            raise FloatingPointError(
                f"Conjugate gradient met pᵀAp ≤ 0 in its first direction. Got curvature {curvature:g}: the inner loss "
                "is not at a minimum. Raise damping, train further before the first outer step, or use GaussNewton()."
            )
        return Solution(
            x=x,
            residual=residual / size,
            iterations=products,
            curvature=curvature,
            status=status,
            state=with_solution(state, x) if self.warm_start else state,
        )
