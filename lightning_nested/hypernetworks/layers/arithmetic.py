"""Sums and products of weights that move with the hyperparameters, without forming those weights."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

MaybeTensor: TypeAlias = Tensor | None


def total(*terms: MaybeTensor) -> MaybeTensor:
    """Add the terms that are given; None if none is."""
    given = [t for t in terms if t is not None]
    return sum(given[1:], given[0]) if given else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``functional.linear`` by one product; torch makes one of each example where x is transposed."""
    if x.dim() < 3:
        return functional.linear(x, weight, bias)
    return functional.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], weight.shape[0])


def moved(base: Tensor | None, coefficient: Tensor, product: Tensor, shift: Tensor | None = None) -> Tensor:
    """base + coefficient ⊙ product + shift, where coefficient and shift broadcast; may reuse the memory of ``base``."""
    like = product if base is None else base
    terms = (base, *(None if t is None else t.to(like.dtype) for t in (coefficient, product, shift)))
    if needs_plain_forward():
        return _sum(*terms)
    return cast("Tensor", _Moved.apply(*terms, False))


def linearly_moved(
    value: Tensor, tangent: MaybeTensor, coefficient: MaybeTensor, product: MaybeTensor, shift: MaybeTensor
) -> Tensor:
    """Return a dual number of this value; coefficient ⊙ product + shift is added to its tangent in place.

    A backward pass from a cotangent u of the output then gives ∂⟨u, J·change⟩/∂φ by an ordinary vector-Jacobian
    product; the tangent itself needs no derivative. (Differentiating a tangent is silently wrong through normalization
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


def _sum(base: MaybeTensor, coefficient: MaybeTensor, product: MaybeTensor, shift: MaybeTensor) -> Tensor:
    if coefficient is None or product is None:
        return cast("Tensor", total(base, shift))
    if base is None:
        return coefficient * product if shift is None else torch.addcmul(shift, coefficient, product)
    result = torch.addcmul(base, coefficient, product)
    return result if shift is None else result + shift


def _add_to(base: Tensor, coefficient: MaybeTensor, product: MaybeTensor, shift: MaybeTensor) -> Tensor:
    if coefficient is not None and product is not None:
        base.addcmul_(coefficient, product)
    return base if shift is None else base.add_(shift)


class _Moved(torch.autograd.Function):
    """base + coefficient ⊙ product + shift; if ``carried``, ``base`` itself with the derivatives of that sum.

    The backward pass of ``addcmul`` would multiply tensors of the output's size four times; two products suffice.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        base, coefficient, product, shift, carried = arguments
        ctx.save_for_backward(coefficient, product)
        ctx.save_for_forward(coefficient, product)
        ctx.carried, ctx.shift = carried, None if shift is None else shift.shape
        if carried:
            return cast("Tensor", base.detach())  # no view to autograd: what follows may work in place
        if base is None or torch._C._len_torch_dispatch_stack():  # a dispatch mode may hold on to base
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
        of_shift = u.sum_to_size(ctx.shift) if needs[3] else None
        return u if needs[0] else None, of_coefficient, of_product, of_shift, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        of_base, of_coefficient, of_product, of_shift, _ = tangents
        if ctx.carried:
            return cast("Tensor | None", of_base)
        coefficient, product = ctx.saved_tensors
        of_coefficient = None if of_coefficient is None else of_coefficient * product
        of_product = None if of_product is None else coefficient * of_product
        return total(of_base, of_coefficient, of_product, of_shift)


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
    """``forward_ad.make_dual`` with types."""
    return cast("Tensor", forward_ad.make_dual(value, tangent))  # type: ignore[no-untyped-call]


def unpack_dual(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the value, and the tangent if there is one."""
    return cast("tuple[Tensor, Tensor | None]", forward_ad.unpack_dual(dual))  # type: ignore[no-untyped-call]


def needs_plain_forward() -> bool:
    """Return True under ``torch.func`` and ``torch.jit.trace``, which custom autograd functions here do not support."""
    return torch._C._are_functorch_transforms_active() or bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call]


def needs_plain_backward(*cotangents: Tensor | None) -> bool:
    """Return True if a backward pass may not work in place.

    It is differentiated itself, takes many cotangents at once, or runs where :func:`needs_plain_forward`.
    """
    return (
        needs_plain_forward()
        or torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or any(u is not None and torch._C._functorch.is_legacy_batchedtensor(u) for u in cotangents)
    )
