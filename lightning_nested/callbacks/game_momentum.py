"""What a measured spectrum says about a game's momentum: the rate of the present one, and a better one nearby."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from lightning_nested.callbacks.step_dynamics import Momentum
from lightning_nested.games import convergence_rate, extragradient_rate, optimistic_rate
from lightning_nested.games.rates import Array, Eigenvalues, as_eigenvalues, momentum_matrix, momentum_radii
from lightning_nested.games.search import search

EXACT_LIMIT = 200  # numbers of all players: the eigenvalues of a step of 3n numbers take about half a second
ADAPT_LIMIT = 60  # likewise, where they are taken some 170 times


def predicted_rate(eigenvalues: Eigenvalues, momentum: Momentum | None, alternating: bool) -> float | None:
    """Worst rate over eigenvalues of DJ, so at a learning rate of 1; None where there is no prediction.

    For alternating momentum it assumes equal curvatures, see :func:`lightning_nested.games.convergence_rate`;
    :class:`JointStep` does not.

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


def better_momentum(
    eigenvalues: Eigenvalues,
    now: Momentum,
    *,
    alternating: bool = False,
    max_momentum: float = 0.95,
    max_change: tuple[float, float] = (0.1, math.pi / 8),
) -> Momentum:
    """The momentum of all players near the present one whose worst rate over the eigenvalues of DJ is smallest.

    Eigenvalues that no momentum up to ``max_momentum`` contracts are left out; if all are, or nothing is better, the
    present one stays.

    Args:
        eigenvalues: Of DJ: the learning rate is in them.
        now: β of the next step.
        alternating: See :func:`lightning_nested.games.convergence_rate`.
        max_momentum: Bound of |β|; a larger one comes down as fast as ``max_change`` allows.
        max_change: Bounds of the changes of |β| and arg β.

    Example:
        On a game of pure conflict the phase rises from 0.

        >>> better = better_momentum([0.1j], Momentum("momentum", 0.8, 0.0))
        >>> round(better.phase, 4), 0.7 <= better.momentum <= 0.9
        (0.3927, True)
    """
    values = as_eigenvalues(eigenvalues)
    upper = values[values.imag >= 0]  # an eigenvalue and its conjugate have one rate
    upper = upper[_contracted(upper, alternating, max_momentum)]
    if len(upper) == 0:
        return now

    def rate(settings: Array) -> float:
        size, phase = settings.T
        return float(momentum_radii(upper, np.ones(1), size, phase, alternating).max())

    return _nearby(rate, [now], max_momentum, max_change)[0]


def better_momenta(
    step: JointStep,
    now: Mapping[int, Momentum],
    *,
    max_momentum: float = 0.95,
    max_change: tuple[float, float] = (0.1, math.pi / 8),
) -> dict[int, Momentum]:
    """Momenta of each player near the present ones at which the joint step has a smaller spectral radius.

    As in :func:`better_momentum` directions that no momentum contracts are left out: the growing modes of the step that
    lie for the most part in the span of their eigenvectors.

    Args:
        step: With the present momenta.
        now: Momentum of each player that may change, by its index.
        max_momentum: As in :func:`better_momentum`, of each player.
        max_change: Likewise.

    Returns:
        For the same players; equal to ``now`` where nothing is better.

    Example:
        One player has curvature 1, the other 0.01: the second one wants more momentum.

        >>> beta, matrix = np.full(2, 0.3), np.diag([1.0, 0.01])
        >>> step = JointStep(matrix=matrix, sizes=(1, 1), steps=None, momentum=beta, phase=0 * beta)
        >>> now = {i: Momentum("momentum", 0.3, 0.0) for i in (0, 1)}
        >>> [round(m.momentum, 2) for m in better_momenta(step, now).values()]
        [0.3, 0.4]
    """
    rate_of = _rate_of(step, max_momentum)
    if rate_of is None or not now:
        return dict(now)

    def rate(settings: Array) -> float:
        return rate_of(step.where(dict(zip(now, settings.tolist(), strict=True))))

    return dict(zip(now, _nearby(rate, list(now.values()), max_momentum, max_change), strict=True))


def _nearby(
    rate: Callable[[Array], float], now: list[Momentum], max_momentum: float, max_change: tuple[float, float]
) -> list[Momentum]:
    """Momenta within reach of which the rate is smaller, else the same; it takes |β| and arg β, shape (players, 2)."""
    # The opposite phase gives the same iterates.
    start = np.array([(m.momentum, min(abs(m.phase), math.pi)) for m in now])
    low, high = np.maximum(start - max_change, 0.0), start + max_change
    # One above the bound comes down by max_change.
    bound = np.minimum(np.maximum(max_momentum, low[:, 0]), 1 - 1e-9)
    high = np.minimum(high, np.stack([bound, np.full_like(bound, math.pi)], axis=1))
    scale = np.tile(max_change, len(now))
    # Both coordinates of each player, and of all together.
    groups = [*np.eye(len(now)), *([np.ones(len(now))] if len(now) > 1 else [])]
    moves = [
        length * scale * np.outer(group, way).reshape(-1)
        for length, group, way in product((1.0, 0.4), groups, product((0, 1, -1), repeat=2))
    ]
    found = search(
        lambda x: rate(x.reshape(start.shape)),
        start.reshape(-1),
        np.stack([low, high], axis=-1).reshape(-1, 2),
        (0.5 * scale, 0.1 * scale),
        evaluations=15,
        moves=moves,
    ).reshape(start.shape)
    return [
        old if (new == was).all() else Momentum("momentum", *new.tolist())
        for old, was, new in zip(now, start, found, strict=True)
    ]


def _rate_of(step: JointStep, max_momentum: float) -> Callable[[JointStep], float] | None:
    """The largest modulus of a mode that some momentum contracts; None where there is none."""
    values, vectors = np.linalg.eig(step.matrix)
    good = _contracted(values.astype(np.complex128), step.alternating, max_momentum)
    if not good.any():
        return None
    if good.all():
        return JointStep.rate
    onto_bad = (vectors[:, ~good] @ np.linalg.inv(vectors)[~good]).real
    bad = int((~good).sum())

    def rate_of(other: JointStep) -> float:
        z, modes = np.linalg.eig(other.map())
        w = modes[2 * len(values) :]
        inside = onto_bad @ w
        sizes = [(np.abs(part) ** 2).sum(axis=0) for part in (inside, w - inside)]
        belongs = sizes[0] / np.maximum(sizes[0] + sizes[1], np.finfo(float).tiny)
        # Each of those directions has one mode that grows or stays.
        growing = np.flatnonzero((np.abs(z) > 1 - 1e-6) & (belongs > 0.5))
        left_out = growing[np.argsort(-belongs[growing], kind="stable")][:bad]
        return float(np.abs(np.delete(z, left_out)).max())

    return rate_of


def _contracted(eigenvalues: Array, alternating: bool, max_momentum: float) -> Array:
    """Which of them some momentum up to ``max_momentum`` contracts."""
    size, phase = np.meshgrid(np.linspace(0, max_momentum, 21), np.linspace(0, math.pi, 21))
    each = [
        momentum_radii(z, np.ones_like(size), size, phase, alternating).min() for z in eigenvalues[:, None]
    ]
    return np.array(each) < 1
