"""Adaptation of momentum to a measured spectrum: a better one near the current one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from torch.optim import Optimizer

from lightning_nested.games.joint_step import ADAPT_LIMIT, JointStep
from lightning_nested.games.measured_spectrum import MeasuredSpectrum
from lightning_nested.games.rates import Array, Eigenvalues, as_eigenvalues, momentum_radii
from lightning_nested.games.search import search
from lightning_nested.linalg.finite import check_matrix
from lightning_nested.optim.step_dynamics import has_complex_momentum, set_momentum
from lightning_nested.optim.update_rules import Momentum


def better_momentum(
    eigenvalues: Eigenvalues,
    now: Momentum,
    *,
    alternating: bool = False,
    max_momentum: float = 0.95,
    max_change: tuple[float, float] = (0.1, math.pi / 8),
) -> Momentum:
    """Find a momentum of all players near ``now`` whose worst rate over the eigenvalues is smaller, else ``now``.

    Eigenvalues that no momentum up to ``max_momentum`` contracts are left out.

    Args:
        eigenvalues: Eigenvalues of DJ: the learning rate is in them.
        now: β of the next step.
        alternating: True for players that step one after the other, see :func:`convergence_rate`.
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
    """Find momenta near the current ones, one of each player, with a smaller spectral radius of the joint step.

    Directions that no momentum contracts are ignored, as in :func:`better_momentum`: modes of the joint step that
    grow, and lie mostly in the span of those eigenvectors, do not count in the radius.

    Args:
        step: Joint step with the current momenta.
        now: Momentum of each player that may change, by its index.
        max_momentum: Bound of |β| of each player, as in :func:`better_momentum`.
        max_change: Bounds of the changes of each player's |β| and arg β.

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
    rate: Callable[[Array], float],
    now: Sequence[Momentum],
    max_momentum: float,
    max_change: tuple[float, float],
) -> list[Momentum]:
    """Minimise a rate of |β| and arg β, shape (players, 2), over the momenta within reach."""
    # The opposite phase gives the same iterates.
    start = np.array([(m.momentum, min(abs(m.phase), math.pi)) for m in now])
    low, high = np.maximum(start - max_change, 0.0), start + max_change
    # One above the bound comes down by max_change.
    bound = np.minimum(np.maximum(max_momentum, low[:, 0]), 1 - 1e-9)
    high = np.minimum(high, np.stack([bound, np.full_like(bound, math.pi)], axis=1))
    # Both coordinates of each player, and of all together.
    groups = np.vstack([np.eye(len(now)), np.ones((int(len(now) > 1), len(now)))])
    scale = np.tile(max_change, len(now))
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
    """Return the function to minimise: the largest modulus of a mode that some momentum contracts; None without any."""
    values, vectors = np.linalg.eig(check_matrix(step.matrix, "The matrix of the joint step"))
    good = _contracted(values.astype(np.complex128), step.alternating, max_momentum)
    if good.all() or not good.any():
        return JointStep.rate if good.any() else None
    onto_bad = (vectors[:, ~good] @ np.linalg.inv(vectors)[~good]).real
    bad = int((~good).sum())

    def rate_of(other: JointStep) -> float:
        z, modes = np.linalg.eig(check_matrix(other.map(), "The matrix of the joint step"))
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
    """Return a mask of those that some momentum up to ``max_momentum`` contracts."""
    size, phase = np.meshgrid(np.linspace(0, max_momentum, 21), np.linspace(0, math.pi, 21))
    rates = [momentum_radii(z, np.ones_like(size), size, phase, alternating) for z in eigenvalues[:, None]]
    return np.array([each.min() < 1 for each in rates], dtype=bool)


def adapt_momenta(measured: MeasuredSpectrum, optimizers: Mapping[str, Optimizer], **limits: Any) -> None:
    """Set the next momentum and phase of every player whose optimizer has complex momentum.

    Args:
        measured: Spectrum of the game.
        optimizers: Optimizer of each player, in the order of the spectrum's players.
        **limits: ``max_momentum`` and ``max_change`` of :func:`better_momenta`.

    Raises:
        ValueError: There is no predicted rate to go by, or no player's momentum can be set; it says why.
    """
    movable = {
        name: momentum
        for name, momentum in measured.momenta.items()
        if momentum is not None and momentum.kind == "momentum" and has_complex_momentum(optimizers[name])
    }
    common, step = measured.momentum, measured.joint_step
    if movable and step is not None and measured.adapts_each_player:
        places = {i: name for i, name in enumerate(optimizers) if name in movable}
        found = better_momenta(step, {i: movable[name] for i, name in places.items()}, **limits)
        better = {name: found[i] for i, name in places.items()}
    elif common is not None and len(movable) == len(optimizers) and max(measured.steps or (1,)) == 1:
        one = better_momentum(measured.eigenvalues, common, alternating=measured.alternating, **limits)
        better = dict.fromkeys(movable, one)
    else:
        raise ValueError(_why_not(measured, movable))
    for name, momentum in better.items():
        set_momentum(optimizers[name], momentum.momentum, momentum.phase)


def _why_not(measured: MeasuredSpectrum, movable: Mapping[str, Momentum]) -> str:
    if any(momentum is not None and momentum.kind != "momentum" for momentum in measured.momenta.values()):
        return "an optimizer's update is another one, as that of ComplexAdam with debias=True and a phase is"
    if not movable:
        return "no player has one momentum that may change; its groups must agree, and ComplexAdam have debias=False"
    small = f"which only the joint step of up to {ADAPT_LIMIT} numbers knows"
    if max(measured.steps or (1,)) > 1:
        steps = dict(zip(measured.momenta, measured.steps or (), strict=True))
        return f"players take several steps in an update (steps_per_player={steps}), {small}"
    return f"the players, or groups of one, differ in momentum, phase or kind of optimizer, {small}; give all the same"
