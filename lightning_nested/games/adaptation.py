"""What a measured spectrum says about a game's momentum: the rate of the present one, and a better one nearby."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_nested.games.joint_step import ADAPT_LIMIT, JointStep
from lightning_nested.games.rates import Array, Eigenvalues, as_eigenvalues, momentum_radii
from lightning_nested.games.search import search
from lightning_nested.optim.step_dynamics import has_complex_momentum
from lightning_nested.optim.update_rules import Momentum

if TYPE_CHECKING:
    from lightning_nested.games.measured_spectrum import MeasuredSpectrum
from lightning_nested.games.joint_step import adapts_each_player, single_steps


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


def optimizers_of(module: Any) -> dict[str, torch.optim.Optimizer]:
    """The optimizer of each player of a running :class:`GameModule`."""
    return {name: player.optimizer.optimizer for name, player in module.running_players.items()}


def adapted_momenta(
    module: Any, measured: MeasuredSpectrum, step: JointStep | None, **limits: Any
) -> dict[str, Momentum]:
    """The next momentum of every player that may have another one.

    Args:
        module: The running :class:`GameModule`.
        measured: Its spectrum.
        step: Its joint step if that is known.
        **limits: ``max_momentum`` and ``max_change`` of :func:`better_momenta`.

    Raises:
        ValueError: There is no predicted rate to go by, or no player's momentum can be set; it says why.
    """
    optimizers = optimizers_of(module)
    movable = {
        name: momentum
        for name, momentum in measured.momenta.items()
        if momentum is not None and momentum.kind == "momentum" and has_complex_momentum(optimizers[name])
    }
    if movable and step is not None and adapts_each_player(step):
        places = {name: i for i, name in enumerate(optimizers)}
        better = better_momenta(step, {places[name]: m for name, m in movable.items()}, **limits)
        return {name: better[places[name]] for name in movable}
    common = measured.momentum
    if common is None or len(movable) < len(optimizers) or not single_steps(module):
        raise ValueError(_why_not(module, measured, movable))
    one = better_momentum(measured.eigenvalues, common, alternating=measured.alternating, **limits)
    return dict.fromkeys(movable, one)


def _why_not(module: Any, measured: MeasuredSpectrum, movable: Mapping[str, Momentum]) -> str:
    if any(momentum is not None and momentum.kind != "momentum" for momentum in measured.momenta.values()):
        return "an optimizer's update is another one, as that of ComplexAdam with debias=True and a phase is"
    if not movable:
        return "no player has one momentum that may change; its groups must agree, and ComplexAdam have debias=False"
    small = f"which only the joint step of up to {ADAPT_LIMIT} numbers knows"
    if not single_steps(module):
        return f"players take several steps in an update (steps_per_player={dict(module.steps_per_player)}), {small}"
    return f"the players, or groups of one, differ in momentum, phase or kind of optimizer, {small}; give all the same"
