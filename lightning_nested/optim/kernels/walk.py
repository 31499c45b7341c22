"""Order of an elementwise update in memory: piece by piece on CPU, all tensors at once on accelerators.

A step is bound by memory. ``torch._foreach_*`` sweeps all its tensors once per operation: right on an accelerator,
where every call is a kernel launch, and a trap on CPU, where the next operation finds nothing in cache. So on CPU a
large tensor comes alone, cut into tiles, and small ones, whose cost is the call, come together in blocks. While
``torch.compile`` traces, all tensors come at once: the compiler fuses the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]  # what the _foreach functions take
Columns: TypeAlias = Sequence[Sequence[Tensor]]
"""Parameters, gradients, buffers: lists of equal lengths, with equal shapes at the same place."""

TILE = 1 << 17  # elements of a piece: four or five of its kind stay in a common second-level cache
SMALL = 1 << 13  # elements; below, the cost of a call is more than that of the arithmetic


def walk(
    many: Callable[..., None],
    *columns: Sequence[Tensor],
    options: Mapping[str, Any],
    one: Callable[..., None] | None = None,
    kernel: Callable[[Columns], Columns] | None = None,
) -> None:
    """Apply an update to the i-th tensors of all columns, for every i.

    Updates get the gradient e = ±g + λw of what is minimised in the place of g, and must not change it.

    Args:
        many: The update of lists ``many([w, ...], [e, ...], ...)``.
        columns: w, g and buffers.
        options: ``weight_decay`` and ``maximize`` are read.
        one: The same update of single tensors ``one(w, e, ...)``, where that saves sweeps.
        kernel: A faster form, which updates what it can and returns the columns of the rest.
    """
    decay, maximize = options["weight_decay"], options["maximize"]

    def ascents(ws: Tensors, gs: Tensors, *buffers: Tensors) -> tuple[Tensors, ...]:
        if maximize:
            gs = torch._foreach_neg(gs)
        if decay:
            gs = torch._foreach_add(gs, ws, alpha=decay)
        return ws, gs, *buffers

    tracing = torch.compiler.is_compiling()
    rest: Columns = columns if kernel is None or tracing else kernel(columns)
    if not rest:
        return
    if tracing or not on_cpu(rest[0]):
        many(*ascents(*map(list, rest)))
        return
    for block in blocks(rest):
        tensors = ascents(*block)
        if one is not None and len(tensors[0]) == 1:
            one(*(a for (a,) in tensors))
        else:
            many(*tensors)


def blocks(columns: Columns) -> Iterator[list[list[Tensor]]]:
    """Yield the columns in portions: small tensors together, large ones alone, in tiles where they are contiguous."""
    sizes = list(map(Tensor.numel, columns[0]))
    if max(sizes) < SMALL and sum(sizes) < TILE:
        yield [list(column) for column in columns]
        return
    small: list[tuple[Tensor, ...]] = []
    elements = 0
    for size, tensors in zip(sizes, zip(*columns, strict=True), strict=True):
        if size < SMALL:
            small.append(tensors)
            elements += size
            if elements >= TILE:
                yield transposed(small)
                small, elements = [], 0
        elif size <= TILE or not all(a.is_contiguous() for a in tensors):
            yield [[a] for a in tensors]
        else:
            for piece in zip(*(a.view(-1).split(TILE) for a in tensors), strict=True):
                yield [[a] for a in piece]
    if small:
        yield transposed(small)


def transposed(rows: Sequence[tuple[Tensor, ...]]) -> list[list[Tensor]]:
    """Return the columns of some rows; none if there are no rows."""
    return [list(column) for column in zip(*rows, strict=True)]


def on_cpu(tensors: Sequence[Tensor]) -> bool:
    """Return True if all are plain CPU tensors; subclasses (DTensor) have no ``out=``, so they go the other way."""
    return all(a.is_cpu and type(a) in (Parameter, Tensor) for a in tensors)


def each(*scalars: Any) -> tuple[Any, ...]:
    """Return the scalars as the _foreach functions take them: numbers as they are, vectors as lists of their entries.

    The stack writes them to memory. Without it Inductor would compute them again, powers and roots, inside of each
    loop over a tensor's elements.
    """
    if not isinstance(scalars[0], Tensor):
        return scalars
    return tuple(list(row.unbind()) for row in torch.stack(scalars).unbind())


def add_scaled(ws: Tensors, xs: Tensors, rate: float) -> None:
    """W ← w + rate·x in place.

    While ``torch.compile`` traces, the rate multiplies as a tensor: a number that is an argument of an operation is
    part of the graph; one that multiplies a tensor is an input, so that a scheduler's change compiles once, not each
    time.
    """
    if torch.compiler.is_compiling():
        varying = torch.ones((), dtype=torch.float64, device=ws[0].device) * rate
        torch._foreach_add_(ws, torch._foreach_mul(xs, varying))
    else:
        torch._foreach_add_(ws, xs, alpha=rate)


def add_quotients(ws: Tensors, xs: Tensors, denominators: Tensors, rate: float | list[Tensor]) -> None:
    """W ← w + rate·x/denominator in place; ``rate`` as from ``each``."""
    if isinstance(rate, list):
        torch._foreach_add_(ws, torch._foreach_mul(torch._foreach_div(xs, denominators), rate))
    else:
        torch._foreach_addcdiv_(ws, xs, denominators, value=rate)


def rotate(e: Tensor, a: Tensor, b: Tensor, c: float, s: float) -> Tensor:
    """(a, b) ← (c·a − s·b + e, s·a + c·b) in place, in four calls; return the one temporary, to be used again."""
    new = torch.add(e, b, alpha=-s)
    b.mul_(c).add_(a, alpha=s)
    torch.add(new, a, alpha=c, out=a)
    return new


def rotate_all(es: Tensors, a: Tensors, b: Tensors, c: float, s: float) -> None:
    """Rotate lists as :func:`rotate` does single tensors."""
    new = torch._foreach_add(es, b, alpha=-s)
    torch._foreach_mul_(b, c)
    torch._foreach_add_(b, a, alpha=s)
    torch._foreach_add_(new, a, alpha=c)
    torch._foreach_copy_(a, new)
