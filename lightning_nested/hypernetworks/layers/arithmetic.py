"""Products with weights that move with the hyperparameters, without forming those weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from lightning_nested.hypernetworks.layers.base import (
    RowResponse,
    needs_plain_backward,
    needs_plain_forward,
    total,
)


def respond_to(
    operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    response: RowResponse | None,
    delta: Tensor,
    place: Callable[[Tensor], Tensor],
    linearized: bool,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``operation(x, W(h_i), b(h_i))`` for each example i, from two operations with the weights of all.

    Args:
        operation: Bilinear in x and the weight, one row of it per output; adds the bias.
        x: Input.
        weight: W₀.
        response: V and W₁; None: the weight does not respond.
        delta: (batch, n), or (n,) for one point of all.
        place: From coefficients (batch, rows) to a shape that broadcasts with the output.
        linearized: Value W₀x + b₀ with the tangent of the response, and derivatives for V and W₁ alone: the mean
            output does not move, ``∂/∂V`` is that of the first-order change.
        bias: b₀.
        shift: Change of the bias, as :func:`shift_of` gives it.
    """
    coefficient = None if response is None else place(response.coefficients(delta))
    if not linearized and shift is not None:
        shift, bias = total(bias, shift), None  # both in one pass over the output
    placed = None if shift is None else place(shift)
    if not linearized:
        base = operation(x, weight, bias)
        if response is None or coefficient is None:
            return base if placed is None else base + placed.to(base.dtype)
        return moved(base, coefficient, operation(x, response.direction, None), placed)
    value, tangent = unpack_dual(x)
    fixed = weight.detach()
    base = operation(value, fixed, None if bias is None else bias.detach())
    # Of the input's derivatives W₀'s alone, as the response's own value is 0 there: hence detached.
    product = None if response is None else operation(value.detach(), response.direction, None)
    if tangent is not None:
        with torch.no_grad():  # by hand: torch's rule for linear layers copies the weight and the result
            tangent = operation(tangent, fixed, None)
    return linearly_moved(base, tangent, coefficient, product, placed)


def shift_of(delta: Tensor, *responses: RowResponse | None) -> Tensor | None:
    """The change of a vector, (batch, rows) or (rows,), or the sum of those of several; None where none responds."""
    return total(*(r.coefficients(delta) * r.direction for r in responses if r is not None))


def moved(base: Tensor | None, coefficient: Tensor, product: Tensor, shift: Tensor | None = None) -> Tensor:
    """base + coefficient ⊙ product + shift, where coefficient and shift broadcast; may use the memory of ``base``."""
    like = product if base is None else base
    terms = (base, *(None if t is None else t.to(like.dtype) for t in (coefficient, product, shift)))
    if needs_plain_forward():
        return _sum(*terms)
    return cast("Tensor", _Moved.apply(*terms, False))


def linearly_moved(
    value: Tensor,
    tangent: Tensor | None,
    coefficient: Tensor | None,
    product: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """A dual number of this value; coefficient ⊙ product + shift joins its tangent in place. See :class:`_Moved`.

    A backward pass from a cotangent u of the output then gives ∂⟨u, J·change⟩/∂φ by an ordinary vector-Jacobian
    product; the tangent itself needs no derivative. (Differentiating a tangent is silently wrong through normalisation
    layers in torch 2.14.)
    """
    if product is None and shift is None:
        return value if tangent is None else make_dual(value, tangent)
    terms = [None if t is None else t.to(value.dtype) for t in (coefficient, product, shift)]
    with torch.no_grad():
        if tangent is None:
            change = _sum(None, *terms)
            change = change if change.shape == value.shape else change.expand_as(value).contiguous()
        else:
            change = _add_to(tangent, *terms)  # the caller has no other use for it
    return make_dual(cast("Tensor", _Moved.apply(value, *terms, True)), change)


def _sum(
    base: Tensor | None, coefficient: Tensor | None, product: Tensor | None, shift: Tensor | None
) -> Tensor:
    if coefficient is None or product is None:
        return cast("Tensor", shift) if base is None else base + cast("Tensor", shift)
    if base is None:
        return coefficient * product if shift is None else torch.addcmul(shift, coefficient, product)
    result = torch.addcmul(base, coefficient, product)
    return result if shift is None else result + shift


def _add_to(base: Tensor, coefficient: Tensor | None, product: Tensor | None, shift: Tensor | None) -> Tensor:
    """The same, in place."""
    if coefficient is not None and product is not None:
        base.addcmul_(coefficient, product)
    return base if shift is None else base.add_(shift)


class _Moved(torch.autograd.Function):
    """base + coefficient ⊙ product + shift, or ``base`` itself with the derivatives of that ("carried").

    The backward pass of ``addcmul`` would multiply tensors of the output's size four times; two products suffice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor | None,
        coefficient: Tensor | None,
        product: Tensor | None,
        shift: Tensor | None,
        carried: bool,
    ) -> Tensor:
        ctx.save_for_backward(coefficient, product)
        ctx.save_for_forward(coefficient, product)
        ctx.carried, ctx.shift = carried, None if shift is None else shift.shape
        if carried:
            return cast("Tensor", base).detach()  # no view to autograd: what follows may work in place
        if base is None or torch._C._len_torch_dispatch_stack():  # which may hold on to base
            return _sum(base, coefficient, product, shift)
        return _add_to(base.detach(), coefficient, product, shift)  # memory costs more here than arithmetic

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (u,), (coefficient, product), needs = cotangents, ctx.saved_tensors, ctx.needs_input_grad
        of_coefficient = of_product = None
        if needs[1]:
            along = u * product
            of_coefficient = along.sum_to_size(coefficient.shape)
            if needs[2] and coefficient.shape != along.shape and not needs_plain_backward(u):
                of_product = torch.mul(u, coefficient, out=along)
        if needs[2] and of_product is None:
            of_product = u * coefficient
        return (
            u if needs[0] else None,
            of_coefficient,
            of_product,
            u.sum_to_size(ctx.shift) if needs[3] else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        of_base, of_coefficient, of_product, of_shift, _ = tangents
        coefficient, product = ctx.saved_tensors
        if ctx.carried:
            return cast("Tensor | None", of_base)
        terms = [
            of_base,
            None if of_coefficient is None else of_coefficient * product,
            None if of_product is None else coefficient * of_product,
            of_shift,
        ]
        return total(*terms)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``functional.linear`` by one product; torch makes one of each example where x is transposed."""
    if x.dim() < 3:
        return functional.linear(x, weight, bias)
    return functional.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], weight.shape[0])


def carry(value: Tensor, change: Tensor) -> Tensor:
    """``value``, whose derivative goes to ``change`` too: value + change − stop(change) without arithmetic."""
    return cast("Tensor", _Carry.apply(value, change.expand_as(value)))


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, change: Tensor) -> Tensor:
        return value.detach()  # no view to autograd: what follows may work in place

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor]:
        return cotangents[0], cotangents[0]


def make_dual(value: Tensor, tangent: Tensor) -> Tensor:
    """A dual number."""
    return cast("Tensor", forward_ad.make_dual(value, tangent))  # type: ignore[no-untyped-call]


def unpack_dual(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    """Its value, and its tangent if it has one."""
    return cast("tuple[Tensor, Tensor | None]", forward_ad.unpack_dual(dual))  # type: ignore[no-untyped-call]
