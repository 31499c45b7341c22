"""What stays of tensors and of their optimizer's memory when the inner parameters change: a layer was unfrozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

Names = Sequence[str] | None
"""Names of a vector's entries; None: a tensor that is kept as a whole."""


@torch.no_grad()
def carry_entries(old: Tensor, new: Tensor, before: Names, now: Names) -> Tensor | None:
    """``new`` with the values of ``old`` where an entry stays.

    Args:
        old: The earlier tensor.
        new: What a tensor begins with.
        before: Names of the entries of ``old``.
        now: Names of the entries of ``new``.

    Returns:
        A fresh tensor; None where nothing stays.

    >>> carry_entries(torch.tensor([1.0, 2.0]), torch.zeros(2), ["a", "b"], ["b", "c"])
    tensor([2., 0.])
    """
    if before is None or now is None or tuple(before) == tuple(now):
        return old.detach().clone().to(new) if old.shape == new.shape else None
    place = {name: i for i, name in enumerate(before)}
    stays = [(i, place[name]) for i, name in enumerate(now) if name in place]
    if not stays:
        return None
    result = new.detach().clone()
    to, where = (torch.tensor(index) for index in zip(*stays, strict=True))
    result[to.to(result.device)] = old.detach()[where.to(old.device)].to(result)
    return result


def carry_optimizer_(
    new: Optimizer, old: Optimizer, origins: Mapping[Tensor, tuple[Tensor, Names, Names]]
) -> None:
    """Give ``new`` what ``old`` remembers: the options of its groups and the state of tensors that stay.

    State of a tensor's shape (a momentum) follows the tensor's entries, and is zero for the new ones; other state
    (a count of steps) is copied.

    Args:
        new: Over the new tensors, without state.
        old: Over the earlier ones.
        origins: For each new tensor that has one, the earlier tensor and the names of the entries before and now.
    """
    if len(new.param_groups) == len(old.param_groups):
        for group, earlier in zip(new.param_groups, old.param_groups, strict=True):
            group.update({key: value for key, value in earlier.items() if key != "params"})
    for tensor, (origin, before, now) in origins.items():
        state = {}
        for key, value in old.state.get(origin, {}).items():
            follows = isinstance(value, Tensor) and value.shape == origin.shape and value.dim() > 0
            state[key] = (
                carry_entries(value, torch.zeros_like(tensor, dtype=value.dtype), before, now)
                if follows
                else value
            )
        if state and all(value is not None for value in state.values()):
            new.state[tensor] = state
