"""Recurrence of an LSTM as one operation with written-out derivatives through time.

Hochreiter & Schmidhuber (1997), Neural Computation 9(8). Autograd, step by step, would keep a dozen small tensors per
step and form each weight gradient as a sum over steps; here it is one product at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lightning_nested.hypernetworks.layers.arithmetic import linear, needs_plain_backward, needs_plain_forward

Hidden = tuple[Tensor, Tensor]


def lstm_recurrence(
    inputs: Tensor,
    start: Hidden,
    weight: Tensor,
    direction: Tensor | None = None,
    coefficient: Tensor | None = None,
    *,
    linearized: bool = False,
) -> tuple[Tensor, Tensor]:
    """(i, f, g, o)ₜ = inputsₜ + W₀hₜ₋₁ + c ⊙ W₁hₜ₋₁;  cellₜ = σ(f)·cellₜ₋₁ + σ(i)·tanh(g);  hₜ = σ(o)·tanh(cellₜ).

    Its first derivatives, backward and forward mode, are products over all steps where the recurrence allows it. A
    derivative that itself is to be differentiated (``create_graph=True``), ``torch.func`` and tracing go through
    :func:`plain_recurrence`.

    Args:
        inputs: Contribution of the inputs and the biases to the gates, (time, batch, 4·units).
        start: h₀ and cell₀, each (batch, units).
        weight: W₀ (4·units, units).
        direction: W₁ of the same shape; None: none.
        coefficient: c (batch, 4·units), one row of each example.
        linearized: Compute with W₀ alone, with c ⊙ W₁h as a tangent, and with the derivatives of that tangent
            for c and W₁ in the backward pass; see :func:`linearly_moved`. ``inputs`` must be a dual number.

    Returns:
        hₜ of all steps (time, batch, units), and the last cell (batch, units).

    Raises:
        ValueError: W₁ is not of W₀'s shape.
    """
    hidden, cell = (s.to(inputs.dtype) for s in start)
    weight = weight.to(inputs.dtype)
    if direction is not None and coefficient is not None:
        if direction.shape != weight.shape:
            raise ValueError(f"W₁ must have W₀'s shape {tuple(weight.shape)}. Got {tuple(direction.shape)}.")
        direction, coefficient = direction.to(inputs.dtype), coefficient.to(inputs.dtype)
    arguments = (inputs, hidden, cell, weight, direction, coefficient, linearized)
    if needs_plain_forward():
        return plain_recurrence(*arguments)
    return cast("tuple[Tensor, Tensor]", _Recurrence.apply(*arguments))


def plain_recurrence(
    inputs: Tensor,
    hidden: Tensor,
    cell: Tensor,
    weight: Tensor,
    direction: Tensor | None,
    coefficient: Tensor | None,
    linearized: bool,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`lstm_recurrence` by operations of torch, step by step; if linearized, without the tangent."""
    outputs = []
    for of_input in inputs.unbind(0):
        gates = of_input + hidden @ weight.T
        if direction is not None and coefficient is not None:
            if linearized:
                change = coefficient * (hidden.detach() @ direction.T)
                gates = gates + (change - change.detach())
            else:
                gates = gates + coefficient * (hidden @ direction.T)
        i, f, g, o = gates.chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        outputs.append(hidden)
    return torch.stack(outputs), cell


class _Recurrence(torch.autograd.Function):
    """See :func:`lstm_recurrence`. Saves the gates after their nonlinearities, cells, tanh(cells) and W₁h."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Compute all steps, written into tensors of all steps."""
        *given, linearized = arguments
        inputs, hidden, cell, weight, direction, coefficient = given
        steps, batch, width = inputs.shape
        units = width // 4
        gates = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        outputs, cells, squashed, new = (inputs.new_empty(steps, batch, units) for _ in range(4))
        turned, stacked = None, weight.T
        if direction is not None and not linearized:
            products = inputs.new_empty(steps, batch, 2 * width)  # W₀h and W₁h together
            turned, stacked = products[..., width:], torch.cat([weight, direction]).T
            both = zip(products, products[..., :width], turned, strict=True)
        h, c = hidden, cell
        # Split before the loop: at a few units, making a view takes as long as the arithmetic.
        i, f, g, o = gates.split([units] * 4, -1)  # type: ignore[no-untyped-call]
        of_steps = zip(inputs, gates, i, f, g, o, new, cells, squashed, outputs, strict=True)
        with torch.autocast(inputs.device.type, enabled=False):
            for x, gate, i, f, g, o, candidate, moved, small, output in of_steps:
                if turned is None:
                    torch.addmm(x, h, stacked, out=gate)
                else:
                    product, general, response = next(both)
                    torch.mm(h, stacked, out=product)
                    torch.add(x, general, out=gate).addcmul_(coefficient, response)
                torch.tanh(g, out=candidate)
                gate.sigmoid_()  # of g too, which is not used: one operation instead of two
                c = torch.mul(f, c, out=moved).addcmul_(i, candidate)
                h = torch.mul(o, torch.tanh(c, out=small), out=output)
        saved = (*given, outputs, gates, new, cells, squashed, turned)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.linearized, ctx.slopes = linearized, None
        ctx.set_materialize_grads(False)
        return outputs, c.clone()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        """Return the tangents of all steps; only W₀ḣ goes step by step."""
        moved_inputs, hidden, cell, moved_weight, moved_direction, moved_coefficient = tangents[:6]
        saved = ctx.saved_tensors
        inputs, first, _, weight, direction, coefficient, outputs, *_, turned = saved
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            before = torch.cat([first.unsqueeze(0), outputs[:-1]])
            total = torch.zeros_like(inputs) if moved_inputs is None else moved_inputs.clone()
            if moved_weight is not None:
                total += linear(before, moved_weight, None)
            if ctx.linearized and direction is not None:
                ctx.turned = linear(before, direction, None)
                total.addcmul_(coefficient.expand_as(total), ctx.turned)
            elif direction is not None:
                if moved_coefficient is not None:
                    total.addcmul_(moved_coefficient.expand_as(total), turned)
                if moved_direction is not None:
                    total.addcmul_(coefficient.expand_as(total), linear(before, moved_direction, None))
            to_gates, to_cell, forget = _slopes(ctx, saved)
            result, turned_weight = torch.empty_like(outputs), weight.T
            h = torch.zeros_like(first) if hidden is None else hidden
            c = torch.zeros_like(first) if cell is None else cell
            for x, slope, to_c, f, output in zip(total, to_gates, to_cell, forget, result, strict=True):
                gate = x.addmm_(h, turned_weight)  # in place: ``total`` is ours
                if not ctx.linearized and direction is not None:
                    gate.addcmul_(coefficient, h @ direction.T)
                moved = gate.view_as(slope).mul_(slope)
                c = torch.addcmul(moved[:, :3].sum(1), f, c)
                h = torch.addcmul(moved[:, 3], to_c, c, out=output)
        return result, c

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        """Go back through time; each weight's gradient is one product at the end."""
        saved = ctx.saved_tensors  # asked for once, as checkpointing wants it
        if needs_plain_backward(*cotangents):
            return _by_plain_operations((*saved[:6], ctx.linearized), ctx.needs_input_grad, cotangents)
        of_outputs, of_cell = cotangents
        inputs, first, _, weight, direction, coefficient, outputs, *_, turned = saved
        needs, (steps, batch, units) = ctx.needs_input_grad, outputs.shape
        width, apart = 4 * units, direction is not None and not ctx.linearized
        with torch.autocast(inputs.device.type, enabled=False):
            to_gates, to_cell, forget = _slopes(ctx, saved)
            # of the gates; c ⊙ the same
            found = inputs.new_empty(steps, batch, 2 * width if apart else width)
            stacked = torch.cat([weight, direction]) if apart else weight
            by_gate = found[..., :width].view(steps, batch, 4, units)
            left, right = found[..., :width], found[..., width:]
            views = (to_gates[:, :, :3], to_gates[:, :, 3], to_cell, forget)
            of_steps = zip(*views, found, left, right, by_gate[:, :, :3], by_gate[:, :, 3], strict=True)
            of_each = [None] * steps if of_outputs is None else of_outputs.unbind(0)
            h = torch.zeros_like(first)
            c = torch.zeros_like(first) if of_cell is None else of_cell
            for u, step in reversed(list(zip(of_each, of_steps, strict=True))):
                slope, to_o, to_c, f, all_gates, plain, response, three, last = step
                if u is not None:
                    h = h + u
                c = torch.addcmul(c, h, to_c)
                torch.mul(slope, c.unsqueeze(1), out=three)
                torch.mul(to_o, h, out=last)
                if apart:
                    torch.mul(plain, coefficient, out=response)
                c = c * f
                h = all_gates @ stacked
            before = torch.cat([first.unsqueeze(0), outputs[:-1]]).flatten(0, 1)
            of_inputs = found[..., :width].contiguous()
            of_weight = of_direction = of_coefficient = None
            if apart and needs[3] and needs[4]:
                of_weight, of_direction = (found.flatten(0, 1).T @ before).split(width)
            elif needs[3]:
                of_weight = of_inputs.flatten(0, 1).T @ before
            if direction is not None and needs[4] and of_direction is None:
                of_direction = (of_inputs * coefficient).flatten(0, 1).T @ before
            if direction is not None and needs[5]:
                turned = ctx.turned if turned is None else turned
                of_coefficient = (of_inputs * turned).sum(0)
        return of_inputs, h, c, of_weight, of_direction, of_coefficient, None


def _slopes(ctx: Any, saved: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """∂cell/∂(i, f, g) and ∂h/∂o in one, (time, batch, 4, units); ∂h/∂cell; and ∂cellₜ/∂cellₜ₋₁ = σ(f)."""
    if ctx.slopes is None:
        _, _, first, *_, gates, g, cells, squashed, _ = saved
        i, f, _, o = gates.chunk(4, -1)
        before = torch.cat([first.unsqueeze(0), cells[:-1]])
        slopes = torch.empty_like(gates)
        to_i, to_f, to_g, to_o = slopes.chunk(4, -1)
        torch.mul(i * (1 - i), g, out=to_i)
        torch.mul(f * (1 - f), before, out=to_f)
        torch.mul(1 - g.square(), i, out=to_g)
        torch.mul(o * (1 - o), squashed, out=to_o)
        ctx.slopes = (slopes.view(*cells.shape[:2], 4, cells.shape[-1]), o * (1 - squashed.square()), f)
    return cast("tuple[Tensor, Tensor, Tensor]", ctx.slopes)


def _by_plain_operations(
    given: Sequence[Any], needs: Sequence[bool], cotangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Compute all steps again, and their derivatives by operations that can be differentiated and batched."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: where an argument depends on another, or is it, only its own part is asked for here.
        arguments: list[Any] = [a.view_as(a) if isinstance(a, Tensor) else a for a in given]
        results = plain_recurrence(*arguments)
    wanted = [a for a, needed in zip(arguments, needs, strict=True) if needed]
    pairs = [(r, u) for r, u in zip(results, cotangents, strict=True) if u is not None]
    used, along = [r for r, _ in pairs], [u for _, u in pairs]
    found = iter(torch.autograd.grad(used, wanted, along, create_graph=graph, allow_unused=True))
    return tuple(next(found) if needed else None for needed in needs)
