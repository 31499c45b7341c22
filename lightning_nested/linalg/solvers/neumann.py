"""Truncated Neumann series."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lightning_nested.linalg.operators import LinearOperator
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
class Neumann(InverseSolver):
    """Truncated series x = α Σ_{k=0}^{K} (I − αA)ᵏ b.

    Equals K unrolled steps of gradient descent of size α from the stationary point. Converges iff every eigenvalue
    of A lies in (0, 2/α); the error along an eigenvalue μ is (1 − αμ)^{K+1}, so truncation acts as damping of about
    1/(α(K+1)). K products with A, O(n) memory.
    Lorraine, Vicol & Duvenaud (2020), AISTATS, PMLR 108:1540-1552.

    Where the terms grow, one more product finds out why. Along negative curvature the solve reports
    ``"negative_curvature"`` and stops before a term becomes longer than b; where α is too large it raises, or with
    ``step_size=None`` halves α and starts again.

    Args:
        num_terms: K ≥ 0, products with A.
        step_size: α; None: 1/λ_max by a power iteration that continues from the previous solve's eigenvector.
        tolerance: Stop early at this relative residual; 0: never.
        warm_start: Begin from the previous solution (one more product).
    """

    num_terms: int = 20  # K
    step_size: float | None = None  # α
    tolerance: float = 0.0
    warm_start: bool = False

    def __post_init__(self) -> None:
        check_positive("num_terms", self.num_terms, zero=True)
        check_positive("step_size", self.step_size)
        check_positive("tolerance", self.tolerance, zero=True)

    def _solve(
        self, operator: LinearOperator, b: Vector, size: float, state: SolverState, reduce: Reduce | None
    ) -> Solution:
        products = 0
        if self.step_size is None:
            state, products = _power_iteration(operator, b, state, reduce)
        start = state.solution if self.warm_start else None
        term = clone(b)
        if start is not None:
            add_(term, operator @ start, alpha=-1.0)
            products += 1
            if agreed_number(norm(term), reduce) >= size:  # the old solution is further away than zero
                start, term = None, clone(b)
        for _ in range(_MAX_HALVINGS):
            step_size = self.step_size if self.step_size is not None else _safe_step(state)
            solution = self._series(operator, term, step_size, size, state, reduce)
            products += solution.iterations
            if solution.status != "diverged":
                break
            if self.step_size is not None:
                raise FloatingPointError(
                    "The Neumann series diverges: step_size must be below 2/λ_max. "
                    f"Got step_size={step_size:g} and terms that grow with alternating sign; "
                    "lower it, or give step_size=None to have it measured."
                )
            assert state.eigenvalue is not None
            state = SolverState(state.solution, state.eigenvector, 2.0 * state.eigenvalue)
        else:
            raise FloatingPointError(
                f"The Neumann series diverges even at step_size={step_size:g}, after {_MAX_HALVINGS} halvings. "
                "Add damping to the curvature, or use GaussNewton()."
            )
        x = solution.x if start is None else add_(solution.x, start)
        return Solution(
            x=x,
            residual=solution.residual,
            iterations=products,
            curvature=solution.curvature,
            status=solution.status,
            state=with_solution(state, x) if self.warm_start else state,
        )

    def _series(
        self,
        operator: LinearOperator,
        first: Vector,
        step_size: float,
        size: float,
        state: SolverState,
        reduce: Reduce | None,
    ) -> Solution:
        """α Σ (I − αA)ᵏ of ``first``; ``size`` is the norm that residuals are relative to."""
        term, total = clone(first), clone(first)  # v, p
        squared = agreed_number(dot(term, term), reduce)
        noise = (_NOISE * torch.finfo(first[0].dtype).eps * size) ** 2
        curvature, status, count, probes = math.nan, "truncated", 0, 0
        if math.sqrt(squared) <= self.tolerance * size:
            return Solution(x=zeros_like(first), residual=math.sqrt(squared) / size, iterations=0)
        for count in range(1, self.num_terms + 1):
            product = operator @ term
            add_(term, product, alpha=-step_size)
            next_squared = check_finite(
                agreed_number(dot(term, term), reduce), "A term of the Neumann series"
            )
            grows = next_squared > squared * (1.0 + _GROWTH) and next_squared > noise
            small = math.sqrt(next_squared) <= max(self.tolerance * size, math.sqrt(noise))
            if grows or small or count == self.num_terms:
                # With v₊ = v − αAv: vᵀAv = v₊ᵀAv + α‖Av‖², so the product is looked at only where it matters.
                energy = agreed_number(dot(term, product) + step_size * dot(product, product), reduce)
                curvature = energy / squared if squared > 0 else math.nan
            if grows and (status == "truncated" or next_squared > size * size):
                # A positive A with ‖v₊‖ > ‖v‖ has a Rayleigh quotient of at least 2/α along Av: one more product
                # tells a step that is too large from negative curvature.
                stiffness = agreed_number(dot(product, operator @ product) / dot(product, product), reduce)
                probes += 1
                if abs(stiffness) * step_size >= 2.0 * (1.0 - _GROWTH):
                    status = "diverged"
                    break
                status = "negative_curvature"
                if next_squared > size * size:
                    break
            add_(total, term)
            squared = next_squared
            if small:
                status = "converged" if status == "truncated" else status
                break
        return Solution(
            x=scale_(total, step_size),
            residual=math.sqrt(squared) / size,
            iterations=count + probes,
            curvature=curvature,
            status=status,
            state=state,
        )


_MAX_HALVINGS = 8
_GROWTH = 1e-6  # relative; below it the growth of a term is rounding
_NOISE = 4.0  # terms below this many machine epsilons of b are rounding


def _safe_step(state: SolverState) -> float:
    assert state.eigenvalue is not None
    return 1.0 / state.eigenvalue


def _power_iteration(
    operator: LinearOperator, b: Vector, state: SolverState, reduce: Reduce | None
) -> tuple[SolverState, int]:
    """Largest |eigenvalue| of A; one product when warm, at most 20 when cold.

    ‖Av‖ with ‖v‖ = 1 is a lower bound of λ_max, so 1/‖Av‖ is safe once it is within a factor of two of it.
    """
    vector, value = state.eigenvector, state.eigenvalue
    limit = 1
    if vector is None:
        generator = torch.Generator().manual_seed(
            0
        )  # a stream of its own: the caller's random numbers are untouched
        vector = tuple(torch.randn(a.shape, generator=generator, dtype=torch.float64).to(a) for a in b)
        scale_(vector, 1.0 / float(norm(vector)))
        limit = 20
    count = 0
    for count in range(1, limit + 1):  # noqa: B007
        product = operator @ vector
        size = check_finite(agreed_number(norm(product), reduce), "A product with the curvature")
        if size == 0.0:  # a null vector: the loss is flat along it
            break
        vector = scale_(product, 1.0 / size)
        settled = value is not None and abs(size - value) <= 0.05 * size
        value = size
        if settled:
            break
    if value is None:
        value = 1.0  # A = 0: any step size gives the same divergent answer, reported by the series
    return SolverState(state.solution, vector, value), count
