"""Steps through the fused kernels that torch has for SGD and Adam on CPU: each sweeps once over memory.

What they compute is enough for complex momentum. SGD's kernel does b ← x·b + y·g, w ← w − r·b in one sweep, with
any x, y and r. Given a in the place of both w and g, it turns the pair (a, b):

    b ← c·b + s·a,  a ← a − (s/|β|²)·b,  which is  a ← σ(c·a − s·b)  with  σ = c/|β|²,  as c² + s² = |β|².

A second call then does a ← a/σ + g, w ← w − lr·a; or Adam's kernel does it, with the second moment, where the first
moment's decay is 1/(1 + σ). Rounding errors grow by |tan φ|, so this is for phases whose cosine is not small.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from lightning_nested.optim.kernels.walk import Columns, Tensors, blocks, transposed

_DTYPES = (torch.float32, torch.float64)
_PLAIN = {Parameter, Tensor}  # a subclass (DTensor, ...) may have no memory of its own
_ULP = 2.0**-52  # of 1


def run_fused(update: Callable[..., None], columns: Columns) -> Columns:
    """Update the tensors that the kernels can take: contiguous float32 and float64 tensors on CPU.

    Args:
        update: ``update([w, ...], [g, ...], ...)``, for tensors of one dtype.
        columns: w, g and buffers.

    Returns:
        The columns of what is left.
    """
    if not works():
        return columns
    parts, left = [columns], []
    if not _fit(columns):
        rows = list(zip(*columns, strict=True))
        fitting = [_fit([[a] for a in row]) for row in rows]
        parts = [
            transposed(
                [row for row, fits in zip(rows, fitting, strict=True) if fits and row[0].dtype == dtype]
            )
            for dtype in _DTYPES
        ]
        left = transposed([row for row, fits in zip(rows, fitting, strict=True) if not fits])
    for part in filter(None, parts):
        for block in blocks(part):
            update(*block)
        for w in part[0]:
            increment_version(w)  # autograd must learn that its saved parameters have changed
    return left


def _fit(columns: Columns) -> bool:
    """Return True if the kernels take every tensor. ``map`` over C functions: a step of small tensors is all calls."""
    dtype, sizes = columns[0][0].dtype, list(map(Tensor.numel, columns[0]))
    return dtype in _DTYPES and all(
        set(map(type, column)) <= _PLAIN
        and set(map(attrgetter("dtype"), column)) == {dtype}
        and all(map(attrgetter("is_cpu"), column))
        and list(map(Tensor.numel, column)) == sizes
        and all(map(Tensor.is_contiguous, column))
        and not any(map(Tensor.is_neg, column))
        for column in columns
    )


@dataclass(frozen=True)
class Turn:
    """(a, b) ← (σ(c·a − s·b), s·a + c·b), for lists of tensors.

    Attributes:
        c: Re β.
        s: Im β, to a whole number of ulps of 1.
    """

    c: float
    s: float

    @classmethod
    def of(cls, c: float, s: float) -> Turn | None:
        """Return None if s is tiny or β more than 60° from the real axis: errors at most double, as tan 60° < 2."""
        if abs(s) < 1e-4 or abs(c) < math.hypot(c, s) / 2:
            return None
        # the kernel forms 1 − (1 − s), which is to be s for either sign
        return cls(c, round(s / _ULP) * _ULP)

    @property
    def scale(self) -> float:
        """The factor σ."""
        return self.c / (self.c**2 + self.s**2)

    def __call__(self, real: list[Tensor], imag: list[Tensor]) -> None:
        """Turn a and b in place."""
        axpby(real, real, imag, x=self.c, y=self.s, rate=self.s / (self.c**2 + self.s**2))


def axpby(
    params: Tensors, grads: Tensors, sums: Tensors, *, x: float, rate: float, y: float = 1.0, **decay: Any
) -> None:
    """``sums ← x·sums + y·(±grads + weight_decay·params)``, ``params ← params − rate·sums``; x is not 0."""
    options = {"weight_decay": 0.0, "maximize": False, "nesterov": False, "is_first_step": False, **decay}
    torch._fused_sgd_(params, grads, sums, momentum=x, dampening=1 - y, lr=rate, **options)


@functools.cache
def works() -> bool:
    """Try the kernels, once a process: they are private functions of torch, and one tensor in two places is unusual."""
    if not (hasattr(torch, "_fused_sgd_") and hasattr(torch, "_fused_adam_")):
        return False
    turn = Turn(c=0.6, s=0.5)
    for dtype in _DTYPES:
        w, g, a, b = torch.linspace(-1, 1, 4 * 37, dtype=dtype, device="cpu").view(4, 37).sin().unbind()
        real, imag = 0.6 * a - 0.5 * b + g, 0.5 * a + 0.6 * b
        expected = (w - 0.1 * real, g.clone(), real, imag)
        try:
            turn([a], [b])
            axpby([w], [g], [a], x=1 / turn.scale, rate=0.1)
        except (TypeError, RuntimeError):  # other arguments, or a check that this use does not pass
            return False
        tolerance = 16 * torch.finfo(dtype).eps
        pairs = zip((w, g, a, b), expected, strict=True)
        if not all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in pairs):
            return False
    return True
