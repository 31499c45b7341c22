"""What a measured spectrum says about a game's momentum: the rate of the present one, and a better one nearby."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_nested.callbacks.step_dynamics import Momentum
from lightning_nested.games import convergence_rate, extragradient_rate, momentum_map, optimistic_rate

EXACT_LIMIT = 200  # numbers of all players: the eigenvalues of a step of 3n numbers take about a second


def predicted_rate(eigenvalues: Tensor, momentum: Momentum | None, alternating: bool) -> float | None:
    """Worst rate over eigenvalues of DJ, so at a learning rate of 1; None where there is no prediction.

    For alternating momentum it assumes equal curvatures, see :func:`lightning_nested.games.convergence_rate`;
    :func:`alternating_rate` does not.

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


def alternating_rate(matrix: Tensor, sizes: Sequence[int], momentum: Momentum) -> float:
    """Rate of players who step one after the other, whatever their curvatures: spectral radius of the step itself.

    Args:
        matrix: DJ, or √D J √D, of shape (n, n).
        sizes: Numbers that each player holds, in the order of their steps.
        momentum: Of kind ``"momentum"``.

    >>> turn = torch.tensor([[0.0, 0.1], [-0.1, 0.0]])
    >>> round(alternating_rate(turn, (1, 1), Momentum("momentum", 0.8, math.pi / 8)), 6)
    0.94394
    """
    step = momentum_map(
        matrix.detach().to("cpu", torch.float64),
        lr=1.0,
        momentum=momentum.momentum,
        phase=momentum.phase,
        sizes=sizes,
    )
    return float(torch.linalg.eigvals(step).abs().max())


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
        max_momentum: Bound of |β|; a larger one comes down as fast as ``max_change`` allows.
        max_change: Bounds of the changes of |β| and arg β.

    Example:
        On a game of pure conflict the phase rises from 0.

        >>> better = better_momentum(torch.tensor([0.1j]), Momentum("momentum", 0.8, 0.0))
        >>> round(better.phase, 4), 0.7 <= better.momentum <= 0.9
        (0.3927, True)
    """
    upper = eigenvalues[eigenvalues.imag >= 0]  # an eigenvalue and its conjugate have one rate

    def rates(sizes: Tensor, phases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        beta, angle = torch.cartesian_prod(sizes, phases).unbind(dim=1)
        each = [
            convergence_rate([z], lr=1.0, momentum=beta, phase=angle, alternating=alternating)
            for z in upper.tolist()
        ]
        return torch.stack([torch.as_tensor(rate) for rate in each], dim=1), beta, angle

    everywhere, _, _ = rates(_grid(0.0, max_momentum), _grid(0.0, math.pi))
    upper = upper[everywhere.min(dim=0).values < 1]
    if len(upper) == 0:
        return now
    size, phase = now.momentum, abs(now.phase)  # the opposite phase gives the same iterates
    bound = min(1 - 1e-9, max(max_momentum, size - max_change[0]))  # from above it comes down by max_change
    sizes = _grid(max(0.0, size - max_change[0]), min(bound, size + max_change[0]))
    phases = _grid(max(0.0, phase - max_change[1]), min(math.pi, phase + max_change[1]))
    near, beta, angle = rates(sizes, phases)
    worst = near.max(dim=1).values
    best = int(worst.argmin())
    present = convergence_rate(upper, lr=1.0, momentum=size, phase=phase, alternating=alternating)
    return Momentum("momentum", float(beta[best]), float(angle[best])) if worst[best] < present else now


def _grid(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 21, dtype=torch.float64).clamp(low, high)
