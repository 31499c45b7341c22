"""Experience of a policy in an environment, and the advantages of its actions."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor


class Rollout(TypedDict):
    """T steps of n environments that are reset in the step after an episode's end; a plain dictionary.

    A step of a reset counts for nothing: it has no action and no reward.

    Attributes:
        observations: (T + 1, n, ...): before each step, and after the last.
        actions: (T, n, ...).
        rewards: (T, n).
        terminated: (T, n), True where the episode ended in a final state, whose value is 0.
        ended: (T, n), True where it ended at all: also at a limit of time, after which rewards would have gone on.
        counts: (T, n), False where an environment was reset.
        returns: (k,), sums of the rewards of the episodes that ended here.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    ended: Tensor
    counts: Tensor
    returns: Tensor


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    ended: Tensor,
    *,
    discount: float = 0.99,
    trace: float = 0.95,
) -> Tensor:
    """Estimate the advantages Aₜ = Σₖ (γλ)ᵏ δₜ₊ₖ of actions, with δₜ = rₜ + γV(sₜ₊₁) − V(sₜ).

    The sum stops where the episode ends. V(sₜ₊₁) is 0 in a final state, but not at a limit of time.
    A + V(s) are the targets of a critic. Differentiable in ``values``.
    Schulman, Moritz, Levine, Jordan & Abbeel (2016), ICLR, arXiv 1506.02438.

    Args:
        rewards: (T, ...).
        values: V, (T + 1, ...), of the observations of a :class:`Rollout`.
        terminated: (T, ...), True in final states.
        ended: (T, ...), True at every end of an episode.
        discount: γ.
        trace: λ: 0 trusts the values most, 1 the rewards.

    Returns:
        (T, ...).

    Example:
        >>> no = torch.tensor([False, False])
        >>> generalized_advantages(torch.ones(2), torch.zeros(3), no, no, discount=0.5, trace=1.0)
        tensor([1.5000, 1.0000])
    """
    errors = rewards + discount * values[1:].where(~terminated, 0.0) - values[:-1]
    found, after = [], torch.zeros_like(errors[0])
    for error, end in zip(errors.flip(0), ended.flip(0), strict=True):
        after = error + discount * trace * after.where(~end, 0.0)
        found.append(after)
    return torch.stack(found[::-1])
