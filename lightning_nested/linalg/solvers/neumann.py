"""Truncated Neumann series."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from typing_extensions import override

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.linalg.shards import shard_like
from lightning_nested.linalg.solvers.base import InverseSolver, LinearSystem, Solution, SolverState
from lightning_nested.linalg.vectors import (
    Vector,
    add_,
    added,
    clone,
    dot,
    double_dot,
    norm,
    scale_,
    zeros_like,
)


@checked
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
        at_least(0, num_terms=self.num_terms)
        positive(step_size=self.step_size)
        at_least(0, tolerance=self.tolerance)

    @override
    def held(self, size: int) -> int:
        # b, its product, a term and the sum; the gradient with its graph; a previous solution or eigenvector.
        return (5 + self.warm_start + (self.step_size is None)) * size

    @property
    def products(self) -> int:
        """Products with A of one solve, at most."""
        return self.num_terms + (2 if self.step_size is None else 0)

    def _solve(self, system: LinearSystem) -> Solution:
        products, state = 0, system.state
        if self.step_size is None:
            state, products = _power_iteration(system)
        start = state.solution if self.warm_start else None
        term = system.b
        if start is not None:
            term = add_(clone(system.b), system.operator @ start, alpha=-1.0)
            products += 1
            if system.number(norm(term)) >= system.size:  # the old solution is further away than zero
                start, term = None, system.b
        for _ in range(_MAX_HALVINGS):
            # No eigenvalue: A = 0, and any step size gives the same divergent answer, reported by the series.
            step_size = self.step_size if self.step_size is not None else 1.0 / (state.eigenvalue or 1.0)
            solution = self._series(system, term, step_size)
            products += solution.iterations
            if solution.status != "diverged":
                break
            if self.step_size is not None:
                raise FloatingPointError(
                    "The Neumann series diverges: step_size must be below 2/λ_max. "
                    f"Got step_size={step_size:g} and terms that grow with alternating sign; "
                    "lower it, or give step_size=None to have it measured."
                )
            state = replace(state, eigenvalue=2.0 / step_size)
        else:
            raise FloatingPointError(
                f"The Neumann series diverges even at step_size={step_size:g}, after {_MAX_HALVINGS} halvings. "
                "Add damping to the curvature, or use GaussNewton()."
            )
        x = solution.x if start is None else add_(solution.x, start)
        state = replace(state, solution=x) if self.warm_start else state
        return replace(solution, x=x, iterations=products, state=state)

    def _series(self, system: LinearSystem, first: Vector, step_size: float) -> Solution:
        """α Σ (I − αA)ᵏ of ``first``."""
        operator, size, number = system.operator, system.size, system.number
        term, total = first, first  # v, p; not written to
        squared = number(dot(term, term))
        noise = (_NOISE * torch.finfo(first[0].dtype).eps * size) ** 2
        curvature, status, count, probes = math.nan, "truncated", 0, 0
        if math.sqrt(squared) <= self.tolerance * size:
            return Solution(x=zeros_like(first), residual=math.sqrt(squared) / size, iterations=0)
        for count in range(1, self.num_terms + 1):
            product, last = operator @ term, count == self.num_terms
            along = dot(term, product) if last else None
            term = (add_ if count > 1 else added)(term, product, alpha=-step_size)
            next_squared = system.finite(dot(term, term), "A term of the Neumann series")
            grows = next_squared > squared * (1.0 + _GROWTH) and next_squared > noise
            small = math.sqrt(next_squared) <= max(self.tolerance * size, math.sqrt(noise))
            if grows or small or last:
                # With v₊ = v − αAv: vᵀAv = v₊ᵀAv + α‖Av‖², so the product is looked at only where it matters.
                if along is None:
                    along = double_dot(term, product) + step_size * double_dot(product, product)
                energy = number(along)
                curvature = energy / squared if squared > 0 else math.nan
            if grows and (status == "truncated" or next_squared > size * size):
                # A positive A with ‖v₊‖ > ‖v‖ has a Rayleigh quotient of at least 2/α along Av: one more product
                # tells a step that is too large from negative curvature.
                stiffness = number(dot(product, operator @ product) / dot(product, product))
                probes += 1
                if abs(stiffness) * step_size >= 2.0 * (1.0 - _GROWTH):
                    status = "diverged"
                    break
                status = "negative_curvature"
                if next_squared > size * size:
                    break
            total = (add_ if count > 1 else added)(total, term)
            squared = next_squared
            if small:
                status = "converged" if status == "truncated" else status
                break
        return Solution(
            x=scale_(clone(first) if total is first else total, step_size),
            residual=math.sqrt(squared) / size,
            iterations=count + probes,
            curvature=curvature,
            status=status,
        )


_MAX_HALVINGS = 8
_GROWTH = 1e-6  # relative; below it the growth of a term is rounding
_NOISE = 4.0  # terms below this many machine epsilons of b are rounding


def _power_iteration(system: LinearSystem) -> tuple[SolverState, int]:
    """Largest |eigenvalue| of A; one product when warm, at most 20 when cold.

    ‖Av‖ with ‖v‖ = 1 is a lower bound of λ_max, so 1/‖Av‖ is safe once it is within a factor of two of it.
    """
    vector, value, limit = system.state.eigenvector, system.state.eigenvalue, 1
    if vector is None:
        # A stream of its own: the caller's random numbers are untouched.
        generator = torch.Generator().manual_seed(0)
        noise = (torch.randn(a.shape, generator=generator, dtype=torch.float64) for a in system.b)
        vector = tuple(
            shard_like(a.to(b.dtype), b).to(b.device) for a, b in zip(noise, system.b, strict=True)
        )
        scale_(vector, 1.0 / float(norm(vector)))
        limit = 20
    count = 0
    for count in range(1, limit + 1):  # noqa: B007
        product = system.operator @ vector
        size = system.finite(norm(product), "A product with the curvature")
        if size == 0.0:  # a null vector: the loss is flat along it
            break
        vector = scale_(product, 1.0 / size)
        settled = value is not None and abs(size - value) <= 0.05 * size
        value = size
        if settled:
            break
    return replace(system.state, eigenvector=vector, eigenvalue=value), count
