"""What a measured spectrum says about a game's momentum: the rate of the present one, and a better one nearby."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from lightning_nested.games import convergence_rate
from lightning_nested.games.joint_step import ADAPT_LIMIT, JointStep
from lightning_nested.games.rates import Array
from lightning_nested.optim.step_dynamics import Momentum, has_complex_momentum

if TYPE_CHECKING:
    from lightning_nested.games.measured_spectrum import MeasuredSpectrum
from lightning_nested.games.joint_step import adapts_each_player, single_steps

_LEAST_GAIN = 1e-9  # of the rate: less is rounding


def better_momentum(
    eigenvalues: Tensor,
    now: Momentum,
    *,
    alternating: bool = False,
    max_momentum: float = 0.95,
    max_change: tuple[float, float] = (0.1, math.pi / 8),
) -> Momentum:
    """The momentum of all players near the present one whose worst rate over the eigenvalues of DJ is smallest.

    A grid, not a descent: the worst rate is neither smooth nor convex. Eigenvalues that no momentum up to
    ``max_momentum`` contracts are left out; if all are, or nothing is better, the present one stays.

    Args:
        eigenvalues: Of DJ: the learning rate is in them.
        now: β of the next step.
        alternating: See :func:`lightning_nested.games.convergence_rate`.
        max_momentum: Bound of |β|; a larger one comes down as fast as ``max_change`` allows.
        max_change: Bounds of the changes of |β| and arg β.

    Example:
        On a game of pure conflict the phase rises from 0.

        >>> better = better_momentum(torch.tensor([0.1j]), Momentum("momentum", 0.8, 0.0))
        >>> round(better.phase, 4), 0.7 <= better.momentum <= 0.9
        (0.3927, True)
    """
    upper = eigenvalues[eigenvalues.imag >= 0]  # an eigenvalue and its conjugate have one rate
    upper = upper[_contracted(upper, alternating, max_momentum)]
    if len(upper) == 0:
        return now
    (low, high), (left, right) = _box(now, max_momentum, max_change)
    near, beta, angle = _rates(upper, _grid(low, high), _grid(left, right), alternating)
    worst = near.max(dim=1).values
    best = int(worst.argmin())
    present = convergence_rate(upper, lr=1.0, momentum=now.momentum, phase=now.phase, alternating=alternating)
    return Momentum("momentum", float(beta[best]), float(angle[best])) if worst[best] < present else now


def better_momenta(
    step: JointStep,
    now: Mapping[int, Momentum],
    *,
    max_momentum: float = 0.95,
    max_change: tuple[float, float] = (0.1, math.pi / 8),
) -> dict[int, Momentum]:
    """Momenta of each player near the present ones at which the joint step has a smaller spectral radius.

    A compass search with two sizes of step over |β| and arg β of each player, and of all of them together, then
    Nelder-Mead over all at once. As in :func:`better_momentum` directions that no momentum contracts are left out: the
    growing modes of the step that lie for the most part in the span of their eigenvectors.

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
    low, high = np.reshape([_box(m, max_momentum, max_change) for m in now.values()], (-1, 2)).T
    start = np.reshape([(m.momentum, min(abs(m.phase), math.pi)) for m in now.values()], -1)
    places = {player: 2 * i for i, player in enumerate(now)}

    def rate(point: Array) -> float:
        return rate_of(step.where({player: (point[i], point[i + 1]) for player, i in places.items()}))

    found = _minimize(rate, start, low, high, np.tile(max_change, len(now)))
    return {
        player: momentum
        if (found[places[player] :][:2] == start[places[player] :][:2]).all()
        else Momentum("momentum", *found[places[player] :][:2].tolist())
        for player, momentum in now.items()
    }


def _minimize(rate: Callable[[Array], float], start: Array, low: Array, high: Array, scale: Array) -> Array:
    """A point of the box where the rate, which is neither smooth nor convex, is smaller; else the start."""
    best, point, size = rate(start), start, len(start)

    def inside(x: Array) -> Array:
        return np.clip(x, low, high)

    # Both coordinates of each player, and of all together.
    groups: list[Array] = [np.eye(size)[i : i + 2] for i in range(0, size, 2)]
    groups += [np.sum(groups, axis=0)] if len(groups) > 1 else []
    for length, group in product((1.0, 0.4), groups):
        for way in product((0, 1, -1), repeat=2):
            trial = inside(point + length * scale * (np.array(way) @ group))
            if (trial != point).any() and (found := rate(trial)) < best - _LEAST_GAIN:
                best, point = found, trial
    tilt = np.eye(size) + 0.2 * np.sin(3 * np.arange(size)[:, None] + 7 * np.arange(size) + 1)
    for length in (0.5, 0.1):  # begun again smaller where it stopped
        options = {"maxfev": 15 * size, "initial_simplex": np.vstack([point, point + length * scale * tilt])}
        end = minimize(lambda x: rate(inside(x)), point, method="Nelder-Mead", options=options)
        if end.fun < best - _LEAST_GAIN:
            best, point = float(end.fun), inside(end.x)
    return point


def _rate_of(step: JointStep, max_momentum: float) -> Callable[[JointStep], float] | None:
    """The largest modulus of a mode that some momentum contracts; None where there is none."""
    values, vectors = np.linalg.eig(step.matrix)
    good = _contracted(torch.from_numpy(values.astype(np.complex128)), step.alternating, max_momentum).numpy()
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


def _contracted(eigenvalues: Tensor, alternating: bool, max_momentum: float) -> Tensor:
    """Which of them some momentum up to ``max_momentum`` contracts."""
    if len(eigenvalues) == 0:
        return torch.zeros(0, dtype=torch.bool)
    everywhere, _, _ = _rates(eigenvalues, _grid(0.0, max_momentum), _grid(0.0, math.pi), alternating)
    return everywhere.min(dim=0).values < 1


def _rates(
    eigenvalues: Tensor, sizes: Tensor, phases: Tensor, alternating: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each eigenvalue at all combinations of |β| and arg β, and these."""
    beta, angle = torch.cartesian_prod(sizes, phases).unbind(dim=1)
    each = [
        convergence_rate([z], lr=1.0, momentum=beta, phase=angle, alternating=alternating)
        for z in eigenvalues.tolist()
    ]
    return torch.stack([torch.as_tensor(rate) for rate in each], dim=1), beta, angle


Box = tuple[tuple[float, float], tuple[float, float]]


def _box(now: Momentum, max_momentum: float, max_change: tuple[float, float]) -> Box:
    """Lowest and highest |β|, and arg β, that one change may reach; the opposite phase gives the same iterates."""
    size, phase = now.momentum, min(abs(now.phase), math.pi)
    bound = min(1 - 1e-9, max(max_momentum, size - max_change[0]))  # from above it comes down by max_change
    return (
        (max(0.0, size - max_change[0]), min(bound, size + max_change[0])),
        (max(0.0, phase - max_change[1]), min(math.pi, phase + max_change[1])),
    )


def _grid(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 21, dtype=torch.float64).clamp(low, high)


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
