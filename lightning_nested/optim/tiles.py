"""How an elementwise update walks through memory: tensor by tensor on CPU, all tensors at once on accelerators.

A step is bound by memory. On CPU ``torch._foreach_*`` sweeps all parameters once per operation; a loop over tensors
finds each in cache again at its next operation. Large tensors are cut into tiles for the same reason; smaller tiles
would lose more to the cost of a call. On accelerators it is the other way round: one kernel for all tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

TILE = 1 << 17  # elements


def on_cpu(*lists: Sequence[Tensor]) -> bool:
    """Whether all are plain CPU tensors; subclasses (DTensor) have no ``out=``, so they take the other way."""
    return all(
        type(a) in (Tensor, Parameter) and a.device.type == "cpu" for tensors in lists for a in tensors
    )


def tiles(*lists: Sequence[Tensor], scratch: int = 1) -> Iterator[tuple[Tensor, ...]]:
    """Matching pieces of the i-th tensor of every list, then ``scratch`` pieces of the same shape to write into.

    Tensors that are not contiguous come whole.
    """
    spare: dict[torch.dtype, list[Tensor]] = {}
    for tensors in zip(*lists, strict=True):
        first = tensors[0]
        if not all(a.is_contiguous() for a in tensors):
            yield (*tensors, *(torch.empty_like(first) for _ in range(scratch)))
            continue
        if first.dtype not in spare:
            size = min(TILE, max(a.numel() for a in lists[0]))
            spare[first.dtype] = [first.new_empty(size) for _ in range(scratch)]
        pieces = zip(*(a.view(-1).split(TILE) for a in tensors), strict=True)
        for piece in pieces:
            yield (*piece, *(s[: piece[0].numel()] for s in spare[first.dtype]))


def ascent(w: Tensor, g: Tensor, weight_decay: float, maximize: bool, out: Tensor) -> Tensor:
    """The gradient of what is minimised: ±g + weight_decay·w, in ``out`` unless it is g itself."""
    if maximize:
        g = torch.neg(g, out=out)
    if weight_decay:
        g = torch.add(g, w, alpha=weight_decay, out=out)
    return g


def ascents(
    params: Sequence[Tensor], grads: Sequence[Tensor], weight_decay: float, maximize: bool
) -> list[Tensor]:
    """The same for lists; new tensors unless they are the gradients themselves."""
    result = list(grads)
    if maximize:
        result = list(torch._foreach_neg(result))
    if weight_decay:
        result = list(torch._foreach_add(result, list(params), alpha=weight_decay))
    return result
