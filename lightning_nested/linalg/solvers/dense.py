"""Factorization of the dense matrix."""

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
    factorizable_dtype,
    symmetrized,
)
from lightning_nested.linalg.vectors import (
    Reduce,
    Vector,
    flatten,
    unflatten,
)


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
        check_positive("damping", self.damping, zero=True)

    def _solve(
        self, operator: LinearOperator, b: Vector, size: float, state: SolverState, reduce: Reduce | None
    ) -> Solution:
        flat = flatten(b)
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
            matrix[:, i] = flatten(operator @ unflatten(unit, b))
        matrix.diagonal().add_(self.damping)
        check_finite(
            agreed_number(torch.linalg.vector_norm(matrix), reduce), "The norm of the curvature matrix"
        )
        eigenvalues = torch.linalg.eigvalsh(symmetrized(matrix))
        smallest = agreed_number(eigenvalues[0], reduce)
        x, failed = torch.linalg.solve_ex(matrix, flat)
        relative = agreed_number(torch.linalg.vector_norm(flat - matrix @ x), reduce) / size
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
