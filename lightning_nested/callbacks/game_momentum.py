"""What a measured spectrum says about a game's momentum: the rate of the present one, and a better one nearby."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from lightning_nested.callbacks.step_dynamics import Momentum
from lightning_nested.games import convergence_rate, extragradient_rate, optimistic_rate
from lightning_nested.games.rates import momentum_radii


def predicted_rate(eigenvalues: Tensor, momentum: Momentum | None, alternating: bool) -> float | None:
    """Worst rate over eigenvalues of DJ, so at a learning rate of 1; None where there is no prediction.

    >>> round(predicted_rate(torch.tensor([0.1j]), Momentum("momentum", 0.8, math.pi / 8), False), 6)
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


def better_momentum(
    eigenvalues: Tensor,
    now: Momentum,
    *,
    alternating: bool = False,
    max_momentum: float = 0.95,
    max_change: tuple[float, float] = (0.1, math.pi / 8),
) -> Momentum:
    """The momentum near the present one whose worst rate over the eigenvalues of DJ is smallest.

    A grid, not a descent: the worst rate is neither smooth nor convex. Eigenvalues that no momentum up to
    ``max_momentum`` contracts are left out; if all are, or nothing is better, the present one stays.

    Args:
        eigenvalues: Of DJ: the learning rate is in them.
        now: β of the next step.
        alternating: See :func:`lightning_nested.games.convergence_rate`.
        max_momentum: Bound of |β|.
        max_change: Bounds of the changes of |β| and arg β.

    Example:
        On a game of pure conflict the phase rises from 0.

        >>> better = better_momentum(torch.tensor([0.1j]), Momentum("momentum", 0.8, 0.0))
        >>> round(better.phase, 4), 0.7 <= better.momentum <= 0.9
        (0.3927, True)
    """
    values = eigenvalues.numpy()

    def radii(sizes: Any, phases: Any) -> Any:
        beta, angle = (g.reshape(-1, 1) for g in np.meshgrid(sizes, phases, indexing="ij"))
        return momentum_radii(values[None], np.ones(1), beta, angle, alternating), beta[:, 0], angle[:, 0]

    everywhere, _, _ = radii(np.linspace(0, max_momentum, 20), np.linspace(0, math.pi, 17))
    contracted = everywhere.min(axis=0) < 1
    if not contracted.any():
        return now
    values = values[contracted]
    sizes = np.linspace(
        max(0.0, now.momentum - max_change[0]), min(max_momentum, now.momentum + max_change[0]), 21
    )
    phase = abs(now.phase)  # the opposite phase gives the same iterates
    phases = np.linspace(max(0.0, phase - max_change[1]), min(math.pi, phase + max_change[1]), 21)
    near, beta, angle = radii(np.append(sizes, now.momentum), np.append(phases, phase))
    best = int(near.max(axis=1).argmin())
    present = momentum_radii(values, np.ones(1), np.array(now.momentum), np.array(phase), alternating).max()
    if not near[best].max() < present:
        return now
    return Momentum("momentum", float(beta[best]), float(angle[best]))
