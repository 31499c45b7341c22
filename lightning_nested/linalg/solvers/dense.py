"""Factorization of the dense matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.linalg.finite import check_matrix
from lightning_nested.linalg.solvers.base import (
    InverseSolver,
    LinearSystem,
    Solution,
    factorizable_dtype,
    symmetrized,
)
from lightning_nested.linalg.vectors import flatten, unflatten


@checked
@dataclass(frozen=True, kw_only=True)
class DenseSolve(InverseSolver):
    """x = (A + damping·I)⁻¹b with the matrix written out: n products, n² memory, the reference on small problems.

    Half precision: products in it, the matrix in float32.

    Args:
        damping: Number added to the diagonal.
        max_size: Largest n that is accepted.
    """

    damping: float = 0.0
    max_size: int = 5000

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping, max_size=self.max_size)

    @override
    def held(self, size: int) -> int:
        # The matrix and its symmetric part; b, x and the gradient with its graph.
        return (2 * size + 3) * size

    def _solve(self, system: LinearSystem) -> Solution:
        flat = flatten(system.b)
        flat = flat.to(factorizable_dtype(flat.dtype))
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
            matrix[:, i] = flatten(system.operator @ unflatten(unit, system.b))
        matrix.diagonal().add_(self.damping)
        system.finite(torch.linalg.vector_norm(matrix), "The norm of the curvature matrix")
        even = check_matrix(symmetrized(matrix), "The curvature matrix")
        smallest = system.number(torch.linalg.eigvalsh(even)[0])
        x, failed = torch.linalg.solve_ex(matrix, flat)
        relative = system.number(torch.linalg.vector_norm(flat - matrix @ x)) / system.size
        if int(failed) or not math.isfinite(relative):
            raise FloatingPointError(
                f"The curvature matrix is singular. Got smallest eigenvalue {smallest:g}; give damping > 0."
            )
        return Solution(
            x=unflatten(x, system.b),
            residual=relative,
            iterations=n,
            curvature=smallest,
            status="converged" if smallest > 0 else "negative_curvature",
            state=system.state,
        )
