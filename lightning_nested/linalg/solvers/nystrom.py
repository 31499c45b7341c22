"""Nyström approximation of low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.linalg.finite import check_finite, check_matrix
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.processes import Reduce, agreed_number
from lightning_nested.linalg.solvers.base import (
    InverseSolver,
    LinearSystem,
    Solution,
    factorizable_dtype,
    symmetrized,
)
from lightning_nested.linalg.vectors import Vector, add_, clone, flatten, norm, unflatten


@checked
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
        seed: Seed of the random sketch, which has a stream of its own.
    """

    rank: int = 20
    damping: float = 0.01  # ρ
    seed: int = 0

    def __post_init__(self) -> None:
        positive(rank=self.rank)
        at_least(0, damping=self.damping)
        at_least(0, seed=self.seed)

    def factor(
        self, operator: LinearOperator, like: Vector, *, reduce: Reduce | None = None
    ) -> NystromInverse:
        """Return (A + ρ)⁻¹ by factors of A, an operator on tuples shaped as ``like``; also a preconditioner."""
        flat = flatten(like)
        n = flat.numel()
        rank = min(self.rank, n)
        if self.damping == 0.0 and rank < n:
            raise ValueError(f"damping must be positive when rank < n. Got damping=0, rank={rank}, n={n}.")
        generator = torch.Generator().manual_seed(self.seed)
        sketch = torch.randn(n, rank, generator=generator, dtype=torch.float64)
        wide = factorizable_dtype(flat.dtype)
        # Rounded to the dtype of the products, if that is narrower.
        sketch = torch.linalg.qr(sketch.to(flat.device))[0].to(flat.dtype).to(wide)
        columns = [flatten(operator @ unflatten(sketch[:, i].contiguous(), like)) for i in range(rank)]
        image = torch.stack(columns, dim=1).to(wide)
        # Its norm is one number that every process agrees on, and it is not finite where an entry is not.
        size = check_finite(
            agreed_number(torch.linalg.vector_norm(image), reduce), "The norm of the Nyström sketch"
        )
        core = check_matrix(symmetrized(sketch.T @ image), "The Nyström core")
        curvature = check_finite(agreed_number(torch.linalg.eigvalsh(core)[0], reduce), "The Nyström core")
        # A shift of rounding size makes the Cholesky factor exist; it is taken off the eigenvalues again.
        shift = torch.finfo(wide).eps * size * math.sqrt(n)
        shift += max(0.0, -2.0 * curvature)
        shifted = image + shift * sketch
        factor, failed = torch.linalg.cholesky_ex(symmetrized(sketch.T @ shifted))
        if int(failed):
            raise FloatingPointError(
                f"The Nyström core is not positive definite. Got smallest eigenvalue {curvature:g}; "
                "raise damping, or use GaussNewton() or ConjugateGradient()."
            )
        half = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T
        basis, singular, _ = torch.linalg.svd(check_matrix(half, "The Nyström factor"), full_matrices=False)
        eigenvalues = (singular**2 - shift).clamp_min(0.0)
        return NystromInverse(basis, eigenvalues, self.damping, like, curvature, rank)

    @override
    def held(self, size: int) -> int:
        # The sketch, its image and the basis of it; b, x and the gradient with its graph.
        return (3 * min(self.rank, size) + 3) * size

    @property
    def products(self) -> int:
        """Products with A of one solve, at most."""
        return self.rank + 1

    def _solve(self, system: LinearSystem) -> Solution:
        inverse = self.factor(system.operator, system.b, reduce=system.reduce)
        x = inverse @ system.b
        residual = clone(system.b)
        add_(residual, system.operator @ x, alpha=-1.0)
        add_(residual, x, alpha=-self.damping)
        length = system.finite(norm(residual), "The residual of the Nyström inverse")
        # Rounding of the core is not curvature.
        scale = float(inverse.eigenvalues.max()) if inverse.eigenvalues.numel() else 0.0
        noise = min(1e3 * torch.finfo(x[0].dtype).eps, 0.1)
        negative = inverse.curvature < -noise * max(scale, 1e-30)
        return Solution(
            x=x,
            residual=length / system.size,
            iterations=inverse.rank + 1,
            curvature=inverse.curvature,
            status="negative_curvature" if negative else "truncated",
            state=system.state,
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
