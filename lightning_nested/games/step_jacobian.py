"""Jacobians of optimizer steps, as operators."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nested.games.jacobian import JacobianOperator
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.vectors import Vector, flatten


class StepJacobian(LinearOperator):
    """(DJ)ᵀ of a game whose players step by w ← w − D·(momentum of g): v ↦ Jᵀ(D v), with the eigenvalues of DJ.

    Args:
        jacobian: J of the joint gradient.
        scale: D for each tensor of ``jacobian.like``.
    """

    symmetric = False
    like: Vector

    def __init__(self, jacobian: JacobianOperator, scale: Vector) -> None:
        self.jacobian, self.scale, self.like = jacobian, scale, jacobian.like
        self._dense: Tensor | None = None

    def matvec(self, v: Vector) -> Vector:
        """Jᵀ(D v)."""
        return self.jacobian.rmatvec(tuple(a * d for a, d in zip(v, self.scale, strict=True)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers that each player holds."""
        return tuple(
            sum(p.numel() for p in self.jacobian.tensors_of(i)) for i in range(self.jacobian.num_players)
        )

    def dense(self) -> Tensor:
        """√D J √D of shape (n, n): similar to DJ, and no player's eigenvectors are larger only by its scale.

        Raises:
            FloatingPointError: An entry is not finite.
        """
        if self._dense is None:  # n products, so once
            root = flatten(self.scale).sqrt()
            found = root[:, None] * self.jacobian.dense() * root
            if not bool(torch.isfinite(found).all()):
                raise FloatingPointError(
                    "The Jacobian must be finite. Got an entry that is not: second derivatives overflowed."
                )
            self._dense = found
        return self._dense


class OwnStepJacobian(LinearOperator):
    """√D H √D of one player, which is symmetric and has the eigenvalues of D H, with H = ∂²L_i/∂w_i².

    Args:
        hessian: H.
        scale: D for each tensor of ``hessian.like``.
    """

    def __init__(self, hessian: LinearOperator, scale: Vector) -> None:
        self.hessian, self.like = hessian, hessian.like
        self._roots = tuple(d.sqrt() for d in scale)

    def matvec(self, v: Vector) -> Vector:
        """√D(H(√D v))."""
        product = self.hessian.matvec(tuple(a * d for a, d in zip(v, self._roots, strict=True)))
        return tuple(a * d for a, d in zip(product, self._roots, strict=True))
