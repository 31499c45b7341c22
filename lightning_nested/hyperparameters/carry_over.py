"""Values and optimizer state that stay when the inner parameters change: a layer was unfrozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

Names: TypeAlias = Sequence[str] | None
"""Names of the entries of a vector; None: a tensor that is kept as a whole."""
Origins: TypeAlias = Mapping[Tensor, tuple[Tensor, Names, Names]]
"""For each new tensor that has one, the earlier tensor and the names of the entries before and now."""


@torch.no_grad()
def carry_entries(old: Tensor, new: Tensor, before: Names, now: Names) -> Tensor | None:
    """Return a copy of ``new`` with the values of ``old`` where an entry stays; None where none does.

    Args:
        old: The earlier tensor.
        new: Tensor of initial values.
        before: Names of the entries of ``old``.
        now: Names of the entries of ``new``.

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


def carry_optimizer_(new: Optimizer, old: Optimizer, origins: Origins) -> None:
    """Give ``new`` the options of ``old``'s groups and the state of tensors that have an origin.

    State of a tensor's shape (a momentum) follows the tensor's entries, and is zero for the new ones; other state
    (a count of steps) is copied.
    """
    if len(new.param_groups) == len(old.param_groups):
        for group, earlier in zip(new.param_groups, old.param_groups, strict=True):
            group.update({key: value for key, value in earlier.items() if key != "params"})
    for tensor, (origin, before, now) in origins.items():
        state = {}
        for key, value in old.state.get(origin, {}).items():
            follows = isinstance(value, Tensor) and value.shape == origin.shape and value.dim() > 0
            start = torch.zeros_like(tensor, dtype=value.dtype) if follows else None
            state[key] = value if start is None else carry_entries(value, start, before, now)
        if state and all(value is not None for value in state.values()):
            new.state[tensor] = state
