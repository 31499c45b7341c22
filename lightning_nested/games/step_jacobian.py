"""Jacobians of optimizer steps, as operators and as matrices."""

from __future__ import annotations

import torch

from lightning_nested.games.jacobian import JacobianOperator
from lightning_nested.games.rates import Array
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.vectors import Vector, flatten


class StepJacobian(LinearOperator):
    """√D A √D of a step w ← w − D·(momentum of g): similar to DA, and symmetric where A is.

    No player's eigenvectors are larger only by its scale.

    Args:
        operator: A, the Jacobian of a game (or Jᵀ, with the same eigenvalues) or a player's own block of it.
        scale: D for each tensor of ``operator.like``, positive.
    """

    def __init__(self, operator: LinearOperator, scale: Vector) -> None:
        self.operator, self.like, self.symmetric = operator, operator.like, operator.symmetric
        self.roots = tuple(d.sqrt() for d in scale)

    def matvec(self, v: Vector) -> Vector:
        """Return √D(A(√D v))."""
        product = self.operator.matvec(tuple(a * d for a, d in zip(v, self.roots, strict=True)))
        return tuple(a * d for a, d in zip(product, self.roots, strict=True))


def step_matrix(jacobian: JacobianOperator, scale: Vector) -> Array:
    """Compute √D J √D of shape (n, n), in float64.

    Raises:
        FloatingPointError: An entry is not finite.
    """
    root = flatten(scale).sqrt()
    matrix = root[:, None] * jacobian.dense() * root
    if not bool(torch.isfinite(matrix).all()):
        raise FloatingPointError(
            "The Jacobian must be finite. Got an entry that is not: second derivatives overflowed."
        )
    found: Array = matrix.detach().to("cpu", torch.float64).numpy()
    return found
