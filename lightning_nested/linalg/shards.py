"""Vectors in shards: DTensors, of whose entries each process holds a part, as ``fully_shard`` makes parameters.

All arithmetic on them is that of the parts, and sums over entries are added up over processes, in one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Importing torch.distributed.tensor takes a second, and where it is not imported there are no shards.
_WHOLE = frozenset((Tensor, nn.Parameter))


def is_shard(tensor: object) -> TypeGuard[DTensor]:
    """Return True for a DTensor."""
    return type(tensor) not in _WHOLE and hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def in_shards(v: Sequence[Tensor | None]) -> bool:
    """Return True if the tensors of a vector are shards; all are, or none."""
    return bool(v) and is_shard(v[0])


def parts(v: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return what this process holds of a vector, as views: the vector itself where it is not in shards."""
    if not in_shards(v):
        return v
    with torch.no_grad():
        return [a.to_local() if is_shard(a) else a for a in v]


def added_up(sums: Tensor, v: Sequence[Tensor]) -> Tensor:
    """Return sums over the parts of a vector as sums over all its entries, the same on every process."""
    if in_shards(v):
        from torch import distributed

        first = v[0]
        assert is_shard(first)
        for dimension, placement in enumerate(first.placements):
            if placement.is_shard():
                distributed.all_reduce(sums, group=first.device_mesh.get_group(dimension))
    return sums


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor that every process has whole; itself where ``like`` is no shard."""
    if not is_shard(like) or is_shard(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Without a source there is no message: every process takes its part of its own tensor.
    whole = whole.to(device=like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def gathered(tensor: Tensor) -> Tensor:
    """Return a whole tensor on the CPU: for a checkpoint, on all processes together."""
    return tensor.full_tensor().cpu() if is_shard(tensor) else tensor
