"""Joint step of all players: its Jacobian, as an operator and as a matrix, and the map that it is with momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lightning_nested.games.jacobian import JacobianOperator
from lightning_nested.games.rates import Array, momentum_matrix
from lightning_nested.linalg.finite import check_matrix
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.vectors import Vector, flatten
from lightning_nested.optim.step_dynamics import StepDynamics

# Numbers of all players: the eigenvalues of a step of 3n numbers take about half a second.
EXACT_LIMIT = 200
# The same where they are taken some 170 times.
ADAPT_LIMIT = 60


@dataclass(frozen=True, kw_only=True, eq=False)
class JointStep:
    """One game update of players with momenta of their own: a matrix where the Jacobian is constant.

    Attributes:
        matrix: DJ, or √D J √D, of shape (n, n).
        sizes: Numbers that each player holds, in the order of their steps.
        steps: Steps of each player in its turn; None: all players step together.
        momentum: |β| of each number, shape (n,).
        phase: arg β of each number, shape (n,).

    >>> import math
    >>> turn = np.array([[0.0, 0.1], [-0.1, 0.0]])
    >>> beta = {"momentum": np.full(2, 0.8), "phase": np.full(2, math.pi / 8)}
    >>> round(JointStep(matrix=turn, sizes=(1, 1), steps=(1, 1), **beta).rate(), 6)
    0.94394
    """

    matrix: Array
    sizes: tuple[int, ...]
    steps: tuple[int, ...] | None
    momentum: Array
    phase: Array

    @property
    def alternating(self) -> bool:
        """True if players take turns."""
        return self.steps is not None

    @property
    def is_small(self) -> bool:
        """True if its eigenvalues can be taken many times, as adaptation does."""
        return len(self.matrix) <= ADAPT_LIMIT

    def map(self) -> Array:
        """Return the matrix that it applies to (Re μ, Im μ, w), shape (3n, 3n)."""
        n = len(self.matrix)
        turns = ((n,), (1,)) if self.steps is None else (self.sizes, self.steps)
        return momentum_matrix(self.matrix, np.ones(n), self.momentum, self.phase, *turns)

    def rate(self) -> float:
        """Return its spectral radius."""
        return float(
            np.abs(np.linalg.eigvals(check_matrix(self.map(), "The matrix of the joint step"))).max()
        )

    def where(self, players: Mapping[int, tuple[float, float]]) -> JointStep:
        """Return the step with another |β| and arg β of some players, by their index."""
        momentum, phase = self.momentum.copy(), self.phase.copy()
        for player, settings in players.items():
            first = sum(self.sizes[:player])
            own = slice(first, first + self.sizes[player])
            momentum[own], phase[own] = settings
        return replace(self, momentum=momentum, phase=phase)


def joint_step(
    jacobian: JacobianOperator, dynamics: Sequence[StepDynamics], steps: tuple[int, ...] | None
) -> JointStep | None:
    """Return the players' joint step; None where the game is large, or an update is no momentum."""
    momenta = [momentum for each in dynamics for momentum in each.momenta]
    if jacobian.size > EXACT_LIMIT or any(m.kind != "momentum" for m in momenta):
        return None
    counts = [p.numel() for p in jacobian.like]
    momentum, phase = np.repeat([(m.momentum, m.phase) for m in momenta], counts, axis=0).T
    matrix = step_matrix(jacobian, tuple(d for each in dynamics for d in each.scale))
    return JointStep(matrix=matrix, sizes=jacobian.sizes, steps=steps, momentum=momentum, phase=phase)


class StepJacobian(LinearOperator):
    """√D A √D of a step w ← w − D·(momentum of g): similar to DA, and symmetric where A is.

    So a player's share of an eigenvector does not grow merely because its steps are larger.

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
