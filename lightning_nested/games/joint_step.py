"""Joint step of all players as one matrix, and the rate that it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lightning_nested.games import convergence_rate, extragradient_rate, optimistic_rate
from lightning_nested.games.rates import Array, Eigenvalues, momentum_matrix
from lightning_nested.games.step_jacobian import StepJacobian
from lightning_nested.optim.step_dynamics import StepDynamics
from lightning_nested.optim.update_rules import Momentum

EXACT_LIMIT = 200  # numbers of all players: the eigenvalues of a step of 3n numbers take about half a second
ADAPT_LIMIT = 60  # likewise, where they are taken some 170 times


def predicted_rate(eigenvalues: Eigenvalues, momentum: Momentum | None, alternating: bool) -> float | None:
    """Worst rate over eigenvalues of DJ, so at a learning rate of 1; None where there is no prediction.

    For alternating momentum it assumes equal curvatures, see :func:`lightning_nested.games.convergence_rate`;
    :class:`JointStep` does not.

    >>> import math
    >>> round(predicted_rate([0.1j], Momentum("momentum", 0.8, math.pi / 8), False), 6)
    0.97743
    """
    if momentum is None or momentum.kind == "unknown":
        return None
    if momentum.kind == "momentum":
        return convergence_rate(
            eigenvalues, lr=1.0, momentum=momentum.momentum, phase=momentum.phase, alternating=alternating
        )
    if alternating:
        return None
    rate = extragradient_rate if momentum.kind == "extragradient" else optimistic_rate
    return float(rate(eigenvalues, lr=1.0))


@dataclass(frozen=True, kw_only=True, eq=False)
class JointStep:
    """One game update of players with momenta of their own, as the matrix that it is where the Jacobian is constant.

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
        """Whether players take turns."""
        return self.steps is not None

    def map(self) -> Array:
        """What it does to (Re μ, Im μ, w), shape (3n, 3n)."""
        n = len(self.matrix)
        turns = ((n,), (1,)) if self.steps is None else (self.sizes, self.steps)
        return momentum_matrix(self.matrix, np.ones(n), self.momentum, self.phase, *turns)

    def rate(self) -> float:
        """Its spectral radius."""
        return float(np.abs(np.linalg.eigvals(self.map())).max())

    def where(self, players: Mapping[int, tuple[float, float]]) -> JointStep:
        """The step of players some of whom have other |β| and arg β."""
        momentum, phase = self.momentum.copy(), self.phase.copy()
        for player, settings in players.items():
            first = sum(self.sizes[:player])
            own = slice(first, first + self.sizes[player])
            momentum[own], phase[own] = settings
        return replace(self, momentum=momentum, phase=phase)


def single_steps(module: Any) -> bool:
    """Whether every player takes one step in an update."""
    return max(module.steps_per_player.values(), default=1) == 1


def joint_step(module: Any, dynamics: Mapping[str, StepDynamics], operator: StepJacobian) -> JointStep | None:
    """The players' joint step; None where the game is large, or an update is no momentum."""
    momenta = [momentum for each in dynamics.values() for momentum in each.momenta]
    if sum(operator.sizes) > EXACT_LIMIT or any(m.kind != "momentum" for m in momenta):
        return None
    counts = [p.numel() for p in operator.like]
    momentum, phase = np.repeat([(m.momentum, m.phase) for m in momenta], counts, axis=0).T
    steps = tuple(module.steps_per_player.get(name, 1) for name in dynamics)
    return JointStep(
        matrix=operator.dense().detach().to("cpu", torch.float64).numpy(),
        sizes=operator.sizes,
        steps=steps if module.update == "alternating" else None,
        momentum=momentum,
        phase=phase,
    )


def adapts_each_player(step: JointStep | None) -> bool:
    """Whether there is a joint step whose eigenvalues can be had many times."""
    return step is not None and len(step.matrix) <= ADAPT_LIMIT
