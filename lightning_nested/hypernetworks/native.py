"""A layer of an LSTM with weights of each example in C, for ``compiled=True``.

Eager, a time step is one matrix product and a dozen operations on a few thousand numbers, which together take as long
as the product. Here they are one call; products stay with torch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_nested._native import build
from lightning_nested.hypernetworks.layers import linear, moved, plain_operations, unpack_dual
from lightning_nested.hypernetworks.recurrence import Hidden, by_plain_operations, lstm_recurrence

Matrix = tuple[Tensor, Tensor, Tensor]
"""W₀ and W₁, both (4·units, …), and the coefficients (batch, 4·units) of W₁'s rows."""


def lstm_layer(
    x: Tensor, start: Hidden, of_inputs: Matrix, of_outputs: Matrix, shift: Tensor, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """One layer in one direction with the weights W₀ + diag(c) W₁ of each example.

    Args:
        x: Inputs (time, batch, width).
        start: h₀ and cell₀, each (batch, units).
        of_inputs: What multiplies x.
        of_outputs: What multiplies the outputs of the step before.
        shift: Sum of the biases of each example, (batch, 4·units), or (4·units,) of all.
        compiled: In C where it can be: float32 and float64 on CPU outside autocast, forward mode and ``torch.func``.

    Returns:
        The outputs of all steps (time, batch, units), and the last cell (batch, units).
    """
    of_inputs, of_outputs = ((w0, w1, _dense(c)) for w0, w1, c in (of_inputs, of_outputs))
    arguments = (x, *start, *of_inputs, *of_outputs, shift)
    if compiled and _fits(arguments) and library(x.dtype) is not None:
        return cast("tuple[Tensor, Tensor]", _Layer.apply(*arguments))
    return _layer(*arguments)


def _dense(tensor: Tensor) -> Tensor:
    """As C reads it."""
    tensor = tensor.contiguous().resolve_neg()
    return tensor.clone() if tensor._is_zerotensor() else tensor


def _layer(
    x: Tensor, h: Tensor, cell: Tensor, w0: Tensor, w1: Tensor, c: Tensor, u0: Tensor, u1: Tensor, d: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = moved(linear(x, w0, None), c, linear(x, w1, None), shift)
    return lstm_recurrence(inputs, (h, cell), u0, u1, d)


def _fits(arguments: tuple[Tensor, ...]) -> bool:
    """Whether C may be given these; it checks nothing itself."""
    x, h, cell, w0, w1, c, u0, u1, d, shift = arguments
    examples, units = h.shape
    rows = 4 * units
    return (
        len(x) > 0
        and x.shape[1] == examples
        and h.shape == cell.shape
        and w0.shape == w1.shape == (rows, x.shape[2])
        and u0.shape == u1.shape == (rows, units)
        and c.shape == d.shape == (examples, rows)
        and shift.shape in ((rows,), (examples, rows))
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()  # fx, fake tensors
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        and not torch.is_autocast_enabled("cpu")
        and {type(a) for a in arguments} <= {Tensor, Parameter}
        and len({a.dtype for a in arguments}) == 1
        and x.dtype in (torch.float32, torch.float64)
        and all(a.is_cpu and unpack_dual(a)[1] is None for a in arguments)
    )


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The two functions of ``lstm.c``; None where there is no compiler, after one warning."""
    found = build(__package__, "lstm.c", dtype, "LSTMs run without it, more slowly")
    if found is not None:
        for function in (found.forward, found.backward):
            function.argtypes = [*[ctypes.c_size_t] * 3, ctypes.c_void_p]
            function.restype = None
    return found


def _table(*tensors: Tensor) -> ctypes.Array[ctypes.c_void_p]:
    """Their addresses; the tensors live as long as it."""
    if {(t.dtype, t.is_cpu, t.is_contiguous()) for t in tensors} != {(tensors[0].dtype, True, True)}:
        raise RuntimeError("A hook changed the dtype or device of what an LSTM layer had saved.")
    table = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    table.tensors = tensors  # type: ignore[attr-defined]
    return table


class _Layer(torch.autograd.Function):
    """See :func:`lstm_layer`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, cell: Tensor, w0: Tensor, w1: Tensor, c: Tensor, u0: Tensor, u1: Tensor,
        d: Tensor, shift: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (steps, batch, _), units = x.shape, h.shape[1]
        gates, by_x = linear(x, w0, None), linear(x, w1, None)
        turned, squashed, outputs = (x.new_empty(steps, batch, k * units) for k in (4, 1, 1))
        cells = x.new_empty(steps + 1, batch, units)
        cells[0] = cell
        by_h = x.new_empty(batch, 8 * units)
        table = _table(by_x, turned, c, d, cells, gates, squashed, by_h, _dense(shift.expand_as(c)), outputs)
        step, stacked = cast("ctypes.CDLL", library(x.dtype)).forward, torch.cat([u0, u1]).T
        for t, before in enumerate((h, *outputs[:-1].unbind(0))):
            torch.mm(before, stacked, out=by_h)
            step(t, batch, units, table)
        ctx.save_for_backward(
            x, h, cell, w0, w1, c, u0, u1, d, shift, by_x, turned, cells, gates, squashed, outputs
        )
        return outputs, cells[-1].clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once, as checkpointing wants it
        arguments, kept = saved[:10], saved[10:]
        if plain_operations(*cotangents):
            return by_plain_operations(_layer, arguments, ctx.needs_input_grad, cotangents)
        with torch.autocast("cpu", enabled=False):
            return _by_c(ctx.needs_input_grad, arguments, kept, cotangents)


def _by_c(
    needs: Sequence[bool], arguments: Sequence[Tensor], kept: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The backward pass of :class:`_Layer`."""
    x, h, cell, w0, w1, c, u0, u1, d, shift = arguments
    c, d = _dense(c), _dense(d)  # hooks may have laid out what was saved in another way
    by_x, turned, *of_gates, outputs = map(_dense, kept)
    given, of_cell = _dense(cotangents[0]), cell.new_zeros(cell.shape).add_(cotangents[1])
    steps, batch, units = outputs.shape
    found, later = x.new_empty(steps, batch, 12 * units), torch.zeros_like(of_cell)
    of_c, of_d, of_shift = (torch.zeros_like(c) for _ in range(3))
    table = _table(by_x, turned, c, d, *of_gates, given, later, of_cell, found, of_c, of_d, of_shift)
    step, stacked = cast("ctypes.CDLL", library(x.dtype)).backward, torch.cat([u0, u1])
    of_products = found[..., 4 * units :].unbind(0)
    for t in reversed(range(steps)):
        step(t, batch, units, table)
        torch.mm(of_products[t], stacked, out=later)
    flat = found.flatten(0, 1)
    left, right = flat[:, : 8 * units], flat[:, 4 * units :]
    of_x = of_w0 = of_w1 = of_u0 = of_u1 = None
    if needs[0]:
        of_x = torch.addmm(left[:, : 4 * units] @ w1, left[:, 4 * units :], w0).view_as(x)
    if needs[3] or needs[4]:
        of_w1, of_w0 = (left.T @ x.flatten(0, 1)).chunk(2)
    if needs[6] or needs[7]:
        before = torch.cat([h.unsqueeze(0), outputs[:-1]]).flatten(0, 1)
        of_u0, of_u1 = (right.T @ before).chunk(2)
    return of_x, later, of_cell, of_w0, of_w1, of_c, of_u0, of_u1, of_d, of_shift.sum_to_size(shift.shape)
