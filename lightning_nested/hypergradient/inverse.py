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

from lightning_nested.hypergradient.curvature import (
    DiagonalOperator,
    FlatOperator,
    LinearOperator,
    as_operator,
)
from lightning_nested.hypergradient.vectors import (
    Reduce,
    Vector,
    add_,
    clone,
    dot,
    flatten,
    norm,
    scale_,
    unflatten,
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


def _number(value: Tensor, reduce: Reduce | None) -> float:
    """A scalar every process agrees on, so that all take the same branch."""
    return float(value if reduce is None else reduce(value.reshape(1)))


def _check_finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{what} must be finite. Got {value}: the loss or its derivatives overflowed; lower the learning rates, "
            "add damping, or train in a wider precision."
        )
    return value


def _positive(name: str, value: float | None, *, zero: bool = False) -> None:
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
        size = _check_finite(_number(norm(b), reduce), "The norm of the right-hand side")
        state = state if state is not None else SolverState()
        if size == 0.0:
            zero = zeros_like(b)
            return Solution(x=zero, residual=0.0, iterations=0, state=_with_solution(state, zero))
        return self._solve(operator, b, size, state, reduce)

    @abstractmethod
    def _solve(
        self, operator: LinearOperator, b: Vector, size: float, state: SolverState, reduce: Reduce | None
    ) -> Solution:
        """Solve for a finite b of norm ``size`` > 0."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of factorisations, which half precision does not have."""
    return torch.promote_types(dtype, torch.float32)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _with_solution(state: SolverState, x: Vector) -> SolverState:
    return SolverState(x, state.eigenvector, state.eigenvalue)


@dataclass(frozen=True, kw_only=True)
class Identity(InverseSolver):
    """x = b, the inverse of the identity: T1-T2, also the zero-term series without its step size.

    Luketina, Berglund, Greff & Raiko (2016), ICML, PMLR 48:2952-2960.
    """

    def _solve(
        self, operator: LinearOperator, b: Vector, size: float, state: SolverState, reduce: Reduce | None
    ) -> Solution:
        return Solution(x=clone(b), residual=math.nan, iterations=0, status="truncated", state=state)


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
        _positive("num_terms", self.num_terms, zero=True)
        _positive("step_size", self.step_size)
        _positive("tolerance", self.tolerance, zero=True)

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
            if _number(norm(term), reduce) >= size:  # the old solution is further away than zero
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
            state=_with_solution(state, x) if self.warm_start else state,
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
        squared = _number(dot(term, term), reduce)
        noise = (_NOISE * torch.finfo(first[0].dtype).eps * size) ** 2
        curvature, status, count, probes = math.nan, "truncated", 0, 0
        if math.sqrt(squared) <= self.tolerance * size:
            return Solution(x=zeros_like(first), residual=math.sqrt(squared) / size, iterations=0)
        for count in range(1, self.num_terms + 1):
            product = operator @ term
            add_(term, product, alpha=-step_size)
            next_squared = _check_finite(_number(dot(term, term), reduce), "A term of the Neumann series")
            grows = next_squared > squared * (1.0 + _GROWTH) and next_squared > noise
            small = math.sqrt(next_squared) <= max(self.tolerance * size, math.sqrt(noise))
            if grows or small or count == self.num_terms:
                # With v₊ = v − αAv: vᵀAv = v₊ᵀAv + α‖Av‖², so the product is looked at only where it matters.
                energy = _number(dot(term, product) + step_size * dot(product, product), reduce)
                curvature = energy / squared if squared > 0 else math.nan
            if grows and (status == "truncated" or next_squared > size * size):
                # A positive A with ‖v₊‖ > ‖v‖ has a Rayleigh quotient of at least 2/α along Av: one more product
                # tells a step that is too large from negative curvature.
                stiffness = _number(dot(product, operator @ product) / dot(product, product), reduce)
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
        size = _check_finite(_number(norm(product), reduce), "A product with the curvature")
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
        preconditioner: Any object with ``M @ v`` on a flat vector (or a LinearOperator), an approximate inverse of A.
        warm_start: Begin from the previous solution (one more product).
    """

    max_iterations: int = 20
    tolerance: float = 1e-6
    damping: float = 0.0
    preconditioner: Any = None
    warm_start: bool = False

    def __post_init__(self) -> None:
        _positive("max_iterations", self.max_iterations)
        _positive("tolerance", self.tolerance, zero=True)
        _positive("damping", self.damping, zero=True)

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
            if _number(norm(r), reduce) < size:
                x = clone(state.solution)
            else:  # the old solution is further away than zero
                r = clone(b)
        z = r if inverse is None else inverse @ r
        p = clone(z)
        rz = _number(dot(r, z), reduce)
        residual = _number(norm(r), reduce)
        curvature, status = math.nan, "truncated"
        for _ in range(self.max_iterations):
            if residual <= self.tolerance * size or residual == 0.0:
                break
            q = operator @ p
            products += 1
            pq = _check_finite(_number(dot(p, q), reduce), "pᵀAp of conjugate gradient")
            pp = _number(dot(p, p), reduce)
            curvature = pq / pp if math.isnan(curvature) else min(curvature, pq / pp)
            if pq <= 0.0:
                status = "negative_curvature"
                break
            step, stepped = rz / pq, True
            add_(x, p, alpha=step)
            add_(r, q, alpha=-step)
            residual = _check_finite(_number(norm(r), reduce), "The residual of conjugate gradient")
            z = r if inverse is None else inverse @ r
            rz, previous = _number(dot(r, z), reduce), rz
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
            state=_with_solution(state, x) if self.warm_start else state,
        )


@dataclass(frozen=True, kw_only=True)
class Nystrom(InverseSolver):
    """Nyström inverse: A ≈ U Λ Uᵀ from ``rank`` products, x = U(Λ + ρ)⁻¹Uᵀb + (b − UUᵀb)/ρ.

    Exact when the rank reaches the numerical rank of A. Positive semi-definite A. ``rank`` products that do
    not depend on each other, rank·n memory; no step size.
    Hataya & Yamada (2023), AISTATS, PMLR 206:4643-4654; the stable sketch of Frangella, Tropp & Udell (2023),
    SIAM J. Matrix Anal. Appl. 44:718-752.

    Half precision: products in it, factors in float32.

    Args:
        rank: Products with A; at most n is used.
        damping: ρ > 0; 0 is allowed when ``rank`` ≥ n.
        seed: Of the random sketch, which has a stream of its own.
    """

    rank: int = 20
    damping: float = 0.01  # ρ
    seed: int = 0

    def __post_init__(self) -> None:
        _positive("rank", self.rank)
        _positive("damping", self.damping, zero=True)

    def factor(
        self, operator: LinearOperator, like: Vector, *, reduce: Reduce | None = None
    ) -> NystromInverse:
        """The factors of the approximation, as an operator (A + ρ)⁻¹ that is also a preconditioner.

        Args:
            operator: A.
            like: A tuple with the shapes of the space.
            reduce: Averages a tensor over processes.
        """
        flat = flatten(like)
        n = flat.numel()
        rank = min(self.rank, n)
        if self.damping == 0.0 and rank < n:
            raise ValueError(f"damping must be positive when rank < n. Got damping=0, rank={rank}, n={n}.")
        generator = torch.Generator().manual_seed(self.seed)
        sketch = torch.randn(n, rank, generator=generator, dtype=torch.float64)
        wide = _wide(flat.dtype)
        # Rounded to the dtype of the products, if that is narrower.
        sketch = torch.linalg.qr(sketch.to(flat.device))[0].to(flat.dtype).to(wide)
        columns = [flatten(operator @ unflatten(sketch[:, i].contiguous(), like)) for i in range(rank)]
        image = torch.stack(columns, dim=1).to(wide)
        core = _symmetric(sketch.T @ image)
        curvature = _check_finite(_number(torch.linalg.eigvalsh(core)[0], reduce), "The Nyström core")
        # A shift of rounding size makes the Cholesky factor exist; it is taken off the eigenvalues again.
        shift = float(torch.finfo(wide).eps * torch.linalg.vector_norm(image) * math.sqrt(n))
        shift += max(0.0, -2.0 * curvature)
        shifted = image + shift * sketch
        factor, failed = torch.linalg.cholesky_ex(_symmetric(sketch.T @ shifted))
        if int(failed):
            raise FloatingPointError(
                f"The Nyström core is not positive definite. Got smallest eigenvalue {curvature:g}; "
                "raise damping, or use GaussNewton() or ConjugateGradient()."
            )
        half = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T
        basis, singular, _ = torch.linalg.svd(half, full_matrices=False)
        eigenvalues = (singular**2 - shift).clamp_min(0.0)
        return NystromInverse(basis, eigenvalues, self.damping, like, curvature, rank)

    def _solve(
        self, operator: LinearOperator, b: Vector, size: float, state: SolverState, reduce: Reduce | None
    ) -> Solution:
        inverse = self.factor(operator, b, reduce=reduce)
        x = inverse @ b
        residual = clone(b)
        add_(residual, operator @ x, alpha=-1.0)
        add_(residual, x, alpha=-self.damping)
        relative = (
            _check_finite(_number(norm(residual), reduce), "The residual of the Nyström inverse") / size
        )
        # Rounding of the core is not curvature.
        scale = float(inverse.eigenvalues.max()) if inverse.eigenvalues.numel() else 0.0
        noise = min(1e3 * torch.finfo(b[0].dtype).eps, 0.1)
        negative = inverse.curvature < -noise * max(scale, 1e-30)
        return Solution(
            x=x,
            residual=relative,
            iterations=inverse.rank + 1,
            curvature=inverse.curvature,
            status="negative_curvature" if negative else "truncated",
            state=state,
        )


class NystromInverse(LinearOperator):
    """(U Λ Uᵀ + ρI)⁻¹ by its factors."""

    def __init__(
        self, basis: Tensor, eigenvalues: Tensor, damping: float, like: Vector, curvature: float, rank: int
    ) -> None:
        self.basis, self.eigenvalues, self.damping = basis, eigenvalues, damping
        self.like, self.curvature, self.rank = like, curvature, rank

    def matvec(self, v: Vector) -> Vector:
        """U(Λ + ρ)⁻¹Uᵀv + (v − UUᵀv)/ρ; the second part is empty at full rank."""
        flat = flatten(v).to(self.basis.dtype)
        coordinates = self.basis.T @ flat
        inside = self.basis @ (coordinates / (self.eigenvalues + self.damping))
        if self.basis.shape[1] < flat.numel():
            inside = inside + (flat - self.basis @ coordinates) / self.damping
        return unflatten(inside, v)


@dataclass(frozen=True, kw_only=True)
class DenseSolve(InverseSolver):
    """x = (A + damping·I)⁻¹b with the matrix written out: n products, n² memory, the reference on small problems.

    Half precision: products in it, the matrix in float32.

    Args:
        damping: Added to the diagonal.
        max_size: Refuses larger n.
    """

    damping: float = 0.0
    max_size: int = 5000

    def __post_init__(self) -> None:
        _positive("damping", self.damping, zero=True)

    def _solve(
        self, operator: LinearOperator, b: Vector, size: float, state: SolverState, reduce: Reduce | None
    ) -> Solution:
        flat = flatten(b)
        flat = flat.to(_wide(flat.dtype))
        n = flat.numel()
        if n > self.max_size:
            raise ValueError(
                f"DenseSolve writes out a matrix: n must be at most max_size={self.max_size}. Got n={n}; "
                "use ConjugateGradient() or Neumann()."
            )
        matrix = torch.empty(n, n, dtype=flat.dtype, device=flat.device)
        for i in range(n):
            unit = torch.zeros_like(flat)
            unit[i] = 1.0
            matrix[:, i] = flatten(operator @ unflatten(unit, b))
        matrix.diagonal().add_(self.damping)
        _check_finite(_number(torch.linalg.vector_norm(matrix), reduce), "The norm of the curvature matrix")
        eigenvalues = torch.linalg.eigvalsh(_symmetric(matrix))
        smallest = _number(eigenvalues[0], reduce)
        x, failed = torch.linalg.solve_ex(matrix, flat)
        relative = _number(torch.linalg.vector_norm(flat - matrix @ x), reduce) / size
        if int(failed) or not math.isfinite(relative):
            raise FloatingPointError(
                f"The curvature matrix is singular. Got smallest eigenvalue {smallest:g}; give damping > 0."
            )
        return Solution(
            x=unflatten(x, b),
            residual=relative,
            iterations=n,
            curvature=smallest,
            status="converged" if smallest > 0 else "negative_curvature",
            state=state,
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
        _check_finite(_number(norm(x), reduce), "The product with the given inverse")
        return Solution(x=x, residual=math.nan, iterations=0, status="truncated", state=state)


def as_solver(solver: InverseSolver | LinearOperator | FlatOperator) -> InverseSolver:
    """A solver as it is; any other object with ``@`` is taken as an approximate inverse."""
    return solver if isinstance(solver, InverseSolver) else GivenInverse(inverse=solver)
