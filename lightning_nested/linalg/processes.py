"""Means over processes: of vectors, of numbers that every process must agree on, and of gradients; objects of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_nested.linalg.shards import in_shards
from lightning_nested.linalg.vectors import Vector, flatten, unflatten, zeros_where_none

Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Averages a tensor over processes; every process receives the same result."""


def average(v: Vector, reduce: Reduce | None) -> Vector:
    """Return the mean of v over processes, in one message; v itself when there is one process.

    So it is in shards: ``fully_shard`` averages gradients when it shares them out.
    """
    return v if reduce is None or not v or in_shards(v) else unflatten(reduce(flatten(v)), v)


def agreed_number(value: Tensor, reduce: Reduce | None) -> float:
    """Return the mean of a scalar over processes, so that all take the same branch."""
    return float(value if reduce is None else reduce(value.reshape(1)))


class _Mean(torch.autograd.Function):
    """The mean over processes. So is its derivative: then means of local derivatives are the global ones."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reduce: Reduce) -> Tensor:
        ctx.reduce = reduce
        return reduce(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.reduce(gradients[0].contiguous().clone()), None


def average_gradients(
    gradients: Sequence[Tensor | None], like: Sequence[Tensor], reduce: Reduce | None
) -> tuple[Tensor | None, ...]:
    """Return the mean over processes in one message, differentiable; None where no process has a gradient."""
    if reduce is None:
        return tuple(gradients)
    used = torch.tensor([g is not None for g in gradients], dtype=like[0].dtype, device=like[0].device)
    filled = (*zeros_where_none(gradients, like), used)
    flat: Tensor = _Mean.apply(flatten(filled), reduce)
    *mean, counts = unflatten(flat, filled)
    return tuple(
        g.to(p.dtype) if count else None
        for g, p, count in zip(mean, like, counts.detach().tolist(), strict=True)
    )


def of_all_processes(mine: Any) -> list[Any]:
    """Return the objects of all processes in order, by pickles; called on all of them together."""
    every = [mine]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        every = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, mine)
    return every
