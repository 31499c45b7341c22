"""How an elementwise update walks through memory: piece by piece on CPU, all tensors at once on accelerators.

A step is bound by memory. ``torch._foreach_*`` sweeps all its tensors once per operation: right on an accelerator,
where every call is a kernel launch, and a trap on CPU, where the next operation finds nothing in cache. So on CPU a
large tensor comes alone, cut into tiles, and small ones, whose cost is the call, come together in blocks. While
``torch.compile`` traces, all tensors come at once: the compiler fuses the operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_nested.optim.kernels.kernel import Kernel

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]  # what the _foreach functions take

TILE = 1 << 17  # elements of a piece: four or five of its kind stay in a common second-level cache
SMALL = 1 << 13  # elements; below, the cost of a call is more than that of the arithmetic


def walk(
    one: Callable[..., None],
    many: Callable[..., None],
    *lists: Sequence[Tensor],
    kernel: Kernel | None = None,
) -> None:
    """Apply an update to the i-th tensors of all lists, for every i.

    Args:
        one: The update of single tensors ``one(w, g, ...)``.
        many: The same update of lists ``many([w, ...], [g, ...], ...)``.
        lists: Parameters first; equal lengths, and equal shapes at the same place.
        kernel: A faster form of the same update, for the tensors that it can take.
    """
    if torch.compiler.is_compiling():
        many(*(list(tensors) for tensors in lists))
        return
    if kernel is not None:
        lists = tuple(kernel.run(lists))
        if not lists:
            return
    if not on_cpu(lists[0]):
        many(*(list(tensors) for tensors in lists))
        return
    for block in blocks(lists):
        if len(block[0]) == 1:
            one(*(column[0] for column in block))
        else:
            many(*block)


def blocks(lists: Sequence[Sequence[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """The lists in portions: small tensors together, large ones alone, cut into tiles where they are contiguous."""
    small: list[tuple[Tensor, ...]] = []
    elements = 0
    for tensors in zip(*lists, strict=True):
        size = tensors[0].numel()
        if size < SMALL:
            small.append(tensors)
            elements += size
            if elements >= TILE:
                yield _columns(small)
                small, elements = [], 0
        elif size <= TILE or not all(a.is_contiguous() for a in tensors):
            yield [[a] for a in tensors]
        else:
            for piece in zip(*(a.view(-1).split(TILE) for a in tensors), strict=True):
                yield [[a] for a in piece]
    if small:
        yield _columns(small)


def _columns(rows: list[tuple[Tensor, ...]]) -> list[list[Tensor]]:
    return [list(column) for column in zip(*rows, strict=True)]


def on_cpu(tensors: Sequence[Tensor]) -> bool:
    """Whether all are plain CPU tensors; subclasses (DTensor) have no ``out=``, so they go the other way."""
    return all(a.is_cpu and type(a) in (Parameter, Tensor) for a in tensors)


def ascent(w: Tensor, g: Tensor, weight_decay: float, maximize: bool) -> Tensor:
    """The gradient of what is minimised, ±g + weight_decay·w; g itself where that is all."""
    if maximize:
        g = g.neg()
    if weight_decay:
        g = g.add(w, alpha=weight_decay)
    return g


def ascents(params: Tensors, grads: Tensors, weight_decay: float, maximize: bool) -> Tensors:
    """The same for lists."""
    if maximize:
        grads = torch._foreach_neg(grads)
    if weight_decay:
        grads = torch._foreach_add(grads, params, alpha=weight_decay)
    return grads


def root_of(x: Any) -> Any:
    """√x of a number or a tensor."""
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def each(*scalars: Any) -> tuple[Any, ...]:
    """The scalars as the _foreach functions take them: numbers as they are, vectors as lists of their entries.

    The stack writes them to memory. Without it Inductor would compute them anew, powers and roots, inside of each loop
    over a tensor's elements.
    """
    if not isinstance(scalars[0], Tensor):
        return scalars
    return tuple(list(row.unbind()) for row in torch.stack(scalars).unbind())


def varying(rate: float | Tensor, like: Tensor) -> float | Tensor:
    """The rate; while ``torch.compile`` traces as a tensor, so that a scheduler's change compiles once, not each time.

    A number that is an argument of an operation is part of the graph; one that multiplies a tensor is an input.
    """
    if torch.compiler.is_compiling() and not isinstance(rate, Tensor):
        return torch.ones((), dtype=torch.float64, device=like.device) * rate
    return rate


def add_scaled(ws: Tensors, xs: Tensors, rate: float) -> None:
    """W ← w + rate·x in place."""
    if torch.compiler.is_compiling():
        torch._foreach_add_(ws, torch._foreach_mul(xs, varying(rate, ws[0])))
    else:
        torch._foreach_add_(ws, xs, alpha=rate)


def add_quotients(ws: Tensors, xs: Tensors, denominators: Tensors, rate: float | list[Tensor]) -> None:
    """W ← w + rate·x/denominator in place; ``rate`` as from ``each``."""
    if isinstance(rate, list):
        torch._foreach_add_(ws, torch._foreach_mul(torch._foreach_div(xs, denominators), rate))
    else:
        torch._foreach_addcdiv_(ws, xs, denominators, value=rate)
