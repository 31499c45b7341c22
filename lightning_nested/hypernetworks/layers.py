"""Layers whose weights answer to hyperparameters: W(h) = W₀ + diag(V h) W₁, one row of W per output unit.

MacKay, Vicol, Lorraine, Duvenaud & Grosse (2019), ICLR, arXiv 1903.03088 (Self-Tuning Networks); linearised:
Bae & Grosse (2020), NeurIPS, arXiv 2010.13514 (Delta-STN).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional


class RowResponse(nn.Module):
    """Change of a parameter with h: Δ(h) = diag(V h) W₁, where a row is all that belongs to one output.

    V begins at zero, so that a converted network is at first the network it was; W₁ begins random, of the size
    of W₀, or as ones for a vector. ``numel + rows · n`` parameters.

    Args:
        like: The parameter W₀ that responds.
        num_hyperparameters: n.
    """

    def __init__(self, like: Tensor, num_hyperparameters: int) -> None:
        super().__init__()
        like = like.detach()
        rows = like.shape[0] if like.dim() else 1
        self.scale = nn.Parameter(like.new_zeros(rows, num_hyperparameters))  # V
        if like.dim() < 2:
            # Ones: a bias often begins at zero, and the product of two zeros would never learn.
            direction = torch.ones_like(like)
        else:
            size = float(like.square().mean().sqrt()) or 1 / math.sqrt(like[0].numel())
            direction = torch.randn_like(like) * size
        self.direction = nn.Parameter(direction)  # W₁

    def coefficients(self, delta: Tensor) -> Tensor:
        """V h, of shape (rows,) or (batch, rows)."""
        return functional.linear(delta.to(self.scale.dtype), self.scale)

    def forward(self, delta: Tensor) -> Tensor:
        """Δ(h) of the parameter's shape, for h (n,)."""
        return self._of_rows(delta) * self.direction

    def added_to(self, weight: Tensor, delta: Tensor) -> Tensor:
        """weight + Δ(h)."""
        return torch.addcmul(weight, self._of_rows(delta), self.direction)

    def inner(self, delta: Tensor, gradient: Tensor) -> Tensor:
        """⟨Δ(h), gradient⟩, without forming Δ; scalar."""
        rows = self.scale.shape[0]
        with_rows = torch.linalg.vecdot(
            self.direction.reshape(rows, -1), gradient.to(self.direction).reshape(rows, -1)
        )
        return torch.dot(self.coefficients(delta), with_rows)

    def _of_rows(self, delta: Tensor) -> Tensor:
        shape = (-1, *(1,) * (self.direction.dim() - 1)) if self.direction.dim() else ()
        return self.coefficients(delta).reshape(shape)


class OnePointError(ValueError):
    """A layer, or the way a network uses it, has no rule of its own for the points it was given."""


class Point:
    """Where the layers of one converted module stand; they share it.

    Attributes:
        delta: h − center of each example (batch, n), or (n,) of all; None: weights are as they stand.
        linearized: Whether the output's first-order change is wanted; see :meth:`Response.at`.
        batch_dim: Dimension of the examples in the inputs of linear layers and embeddings.
        visited: How often each layer was called since, by its id.
        inside: Whether a layer is being called.
        read: Parameters that were read from layers outside their calls since.
    """

    def __init__(self, batch_dim: int = 0) -> None:
        self.delta: Tensor | None = None
        self.linearized = False
        self.batch_dim = batch_dim
        self.visited: Counter[int] = Counter()
        self.inside = False
        self.read: list[str] = []


if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class HyperLayer(_Base):
    """What the layers share; mixed into a class of ``torch.nn``, whose parameters keep their names.

    A layer is called with ``layer(x, h)``: h of shape (n,) for one point, or (batch, n) for one of each example.
    Inside a module made by :func:`best_response`, h comes from there, and the call is the plain one.
    """

    plain: type[nn.Module]  # the class of torch.nn
    _point: Point | None = None

    def respond(
        self,
        num_hyperparameters: int,
        point: Point | None = None,
        shared: dict[int, RowResponse] | None = None,
    ) -> None:
        """Give each parameter of the layer its response.

        Args:
            num_hyperparameters: n.
            point: Of the whole module.
            shared: Responses so far by the parameter's id: a shared weight has one.
        """
        known = {} if shared is None else shared
        for name, parameter in list(self.named_parameters(recurse=False)):
            if parameter.requires_grad:
                if id(parameter) not in known:
                    known[id(parameter)] = RowResponse(parameter, num_hyperparameters)
                self.add_module(f"{name}_response", known[id(parameter)])
        self._point = point
        self.num_hyperparameters = num_hyperparameters

    def __getattr__(self, name: str) -> Any:
        """As of any module; reads of a parameter past the layer are noted, as its rule cannot reach them."""
        value = super().__getattr__(name)
        point = self.__dict__.get("_point")
        if (
            point is not None
            and point.delta is not None
            and not point.inside
            and isinstance(value, nn.Parameter)
        ):
            point.read.append(name)
        return value

    def revert(self) -> None:
        """Become the plain layer again, with the weights that stand in it."""
        for name in [name for name in self._modules if name.endswith("_response")]:
            del self._modules[name]
        self.__dict__.pop("_point", None)
        self.__dict__.pop("num_hyperparameters", None)
        self.__class__ = self.plain  # type: ignore[assignment]

    def response_of(self, name: str) -> RowResponse | None:
        """The response of a parameter; None where it has none."""
        return cast("RowResponse | None", self._modules.get(f"{name}_response"))

    def _call(
        self, per_example: Callable[[Tensor, Tensor, bool], Any], x: Any, h: Tensor | None, *rest: Any
    ) -> Any:
        """Plain, at one h, or at one of each example."""
        point = self._point
        if h is None:
            if point is None:
                raise ValueError(
                    f"{type(self).__name__} needs h of shape (n,) or (batch, n). Got none; call layer(x, h)."
                )
            point.visited[id(self)] += 1
            if point.delta is None:
                return self._plain(x, *rest)
            point.inside = True
            try:
                return per_example(x, point.delta, point.linearized)
            finally:
                point.inside = False
        check_hyperparameters(h, self.num_hyperparameters)
        if h.dim() == 2:
            return per_example(x, h, False)
        weights = {}
        for name, parameter in self.named_parameters(recurse=False):
            response = self.response_of(name)
            if response is not None:
                weights[name] = response.added_to(parameter, h)
        # The substituted call comes back without h, as one inside a converted module does.
        held, self._point = point, Point()
        try:
            return torch.func.functional_call(self, weights, (x, *rest))
        finally:
            self._point = held

    def _plain(self, x: Any, *rest: Any) -> Any:
        """With the weights as they stand."""
        return self.plain.forward(self, x, *rest)

    @property
    def _batch_dim(self) -> int:
        return self._point.batch_dim if self._point is not None else 0


def check_hyperparameters(h: Tensor, num_hyperparameters: int) -> None:
    """h must be (n,) or (batch, n)."""
    if h.dim() not in (1, 2) or h.shape[-1] != num_hyperparameters:
        raise ValueError(
            f"h must have shape ({num_hyperparameters},), or (batch, {num_hyperparameters}) for one point of each "
            f"example. Got {tuple(h.shape)}."
        )


def check_examples(x: Tensor, delta: Tensor, dim: int, layer: str, least: int = 2) -> None:
    """x must have one example for each row of h, unless there is one point of all."""
    if delta.dim() == 2 and (x.dim() < max(dim + 1, least) or x.shape[dim] != len(delta)):
        raise OnePointError(
            f"x must have as many examples (dimension {dim}) as h has rows, {len(delta)}. Got shape "
            f"{tuple(x.shape)} in {layer}; give one h of shape (n,), or batch_dim= of best_response."
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


def total(*terms: Tensor | None) -> Tensor | None:
    """Sum of the terms that are given; None where none is."""
    given = [t for t in terms if t is not None]
    return sum(given[1:], given[0]) if given else None


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


def placement(dims: int, batch_dim: int, row_dim: int) -> Callable[[Tensor], Tensor]:
    """From (rows,) or (batch, rows) to a shape of ``dims`` dimensions that broadcasts with the output."""

    def place(c: Tensor) -> Tensor:
        shape = [1] * dims
        shape[row_dim] = c.shape[-1]
        if c.dim() == 2:
            shape[batch_dim] = c.shape[0]
        return c.reshape(shape)

    return place


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


class HyperLinear(HyperLayer, nn.Linear):
    """y = W₀x + b₀ + (V h) ⊙ (W₁x) + (U h) ⊙ b₁.

    ``2(in·out + out) + 2·out·n`` parameters.

    Args:
        in_features: Width of x.
        out_features: Width of y.
        num_hyperparameters: n.
        bias: Whether there is b₀.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        x (batch, …, in) with h (n,) or (batch, n); y (batch, …, out).

    >>> layer = HyperLinear(3, 2, num_hyperparameters=5)
    >>> sum(p.numel() for p in layer.parameters()) == 2 * (3 * 2 + 2) + 2 * 2 * 5
    True
    """

    plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_hyperparameters: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.respond(num_hyperparameters)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """y for one h, or one of each example."""
        return cast("Tensor", self._call(self._per_example, x, h))

    def _per_example(self, x: Tensor, delta: Tensor, linearized: bool) -> Tensor:
        dim = self._batch_dim
        check_examples(x, delta, dim, type(self).__name__)
        return respond_to(
            linear, x, self.weight, self.response_of("weight"), delta,
            placement(x.dim(), dim, -1), linearized, self.bias, shift_of(delta, self.response_of("bias")),
        )  # fmt: skip


class _HyperConv(HyperLayer):
    """Convolutions, with one coefficient per output channel."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """y for one h, or one of each example."""
        return cast("Tensor", self._call(self._per_example, x, h))

    def _per_example(self, x: Tensor, delta: Tensor, linearized: bool) -> Tensor:
        conv = cast("nn.Conv2d", self)
        if x.dim() != conv.weight.dim():
            raise OnePointError(
                f"{type(self).__name__} with one h of each example needs a batch of images. Got {tuple(x.shape)}."
            )
        check_examples(x, delta, 0, type(self).__name__)
        return respond_to(
            conv._conv_forward,  # padding modes included
            x, conv.weight, self.response_of("weight"), delta, placement(x.dim(), 0, 1), linearized,
            conv.bias, shift_of(delta, self.response_of("bias")),
        )  # fmt: skip


class HyperConv1d(_HyperConv, nn.Conv1d):
    """``nn.Conv1d`` with the response of :class:`HyperLinear` per output channel.

    Args:
        in_channels: Of x.
        out_channels: Of y.
        kernel_size: Width of the kernel.
        num_hyperparameters: n.
        **options: The other arguments of ``nn.Conv1d``.
    """

    plain = nn.Conv1d

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, num_hyperparameters: int, **options: Any
    ) -> None:
        nn.Conv1d.__init__(self, in_channels, out_channels, kernel_size, **options)
        self.respond(num_hyperparameters)


class HyperConv2d(_HyperConv, nn.Conv2d):
    """``nn.Conv2d`` with the response of :class:`HyperLinear` per output channel.

    Args:
        in_channels: Of x.
        out_channels: Of y.
        kernel_size: Sides of the kernel.
        num_hyperparameters: n.
        **options: The other arguments of ``nn.Conv2d``.

    >>> layer = HyperConv2d(1, 4, 3, num_hyperparameters=2)
    >>> tuple(layer(torch.zeros(5, 1, 8, 8), torch.zeros(5, 2)).shape)
    (5, 4, 6, 6)
    """

    plain = nn.Conv2d

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, num_hyperparameters: int, **options: Any
    ) -> None:
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, **options)
        self.respond(num_hyperparameters)


class HyperEmbedding(HyperLayer, nn.Embedding):
    """Row of token t: e₀ₜ + (vₜ·h) e₁ₜ.

    ``2·num·dim + num·n`` parameters. The rows are those of a tied output layer, so that a shared weight has one
    response.

    Args:
        num_embeddings: Number of tokens.
        embedding_dim: Width of a row.
        num_hyperparameters: n.
        **options: The other arguments of ``nn.Embedding``.
    """

    plain = nn.Embedding

    def __init__(
        self, num_embeddings: int, embedding_dim: int, num_hyperparameters: int, **options: Any
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        self.respond(num_hyperparameters)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """Rows of the tokens x (batch, …) for one h, or one of each example."""
        return cast("Tensor", self._call(self._per_example, x, h))

    def _per_example(self, x: Tensor, delta: Tensor, linearized: bool) -> Tensor:
        dim = self._batch_dim
        check_examples(x, delta, dim, type(self).__name__, least=1)
        base = functional.embedding(x, self.weight.detach() if linearized else self.weight, self.padding_idx)
        response = self.response_of("weight")
        if response is None:
            return base
        shape = [1] * x.dim()
        if delta.dim() == 2:
            shape[dim] = len(delta)
        rows = functional.embedding(x, response.scale, self.padding_idx)
        coefficient = (rows * delta.to(rows.dtype).reshape(*shape, -1)).sum(-1, keepdim=True)
        direction = functional.embedding(x, response.direction, self.padding_idx)
        if linearized:
            return linearly_moved(base, None, coefficient, direction, None)
        return moved(base, coefficient, direction)


class _HyperNorm(HyperLayer):
    """Normalisation layers: gain and shift respond entry by entry, the statistics are those of the batch."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """y for one h, or one of each example."""
        return cast("Tensor", self._call(self._per_example, x, h))

    def _per_example(self, x: Tensor, delta: Tensor, linearized: bool) -> Tensor:
        layer_norm = isinstance(self, nn.LayerNorm)
        dim = self._batch_dim if layer_norm else 0
        check_examples(x, delta, dim, type(self).__name__)
        gain, shift = self._parameters["weight"], self._parameters["bias"]
        self._parameters["weight"] = self._parameters["bias"] = None
        try:
            y = cast("Tensor", self.plain.forward(self, x))
        finally:
            self._parameters["weight"], self._parameters["bias"] = gain, shift
        return self._affine(
            y, gain, shift, delta, placement(x.dim(), dim, -1 if layer_norm else 1), linearized
        )

    def _affine(
        self,
        y: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        delta: Tensor,
        place: Callable[[Tensor], Tensor],
        linearized: bool,
    ) -> Tensor:
        """gain(h) ⊙ y + shift(h)."""
        of_gain, of_shift = (shift_of(delta, self.response_of(name)) for name in ("weight", "bias"))
        if not linearized:
            gain, shift = total(gain, of_gain), total(shift, of_shift)
            coefficient, shift = (None if t is None else place(t) for t in (gain, shift))
            if coefficient is None:
                return y if shift is None else y + shift.to(y.dtype)
            return moved(None, coefficient, y, shift)
        value, tangent = unpack_dual(y)
        normal, fixed = value.detach(), None if gain is None else place(gain.detach()).to(y.dtype)
        if fixed is not None:
            value = value * fixed
            tangent = None if tangent is None else tangent * fixed
        elif tangent is not None:
            tangent = tangent.clone()  # it is not ours to change
        if shift is not None:
            value = value + place(shift.detach()).to(y.dtype)
        of_gain, of_shift = (None if t is None else place(t) for t in (of_gain, of_shift))
        return linearly_moved(value, tangent, of_gain, None if of_gain is None else normal, of_shift)


class HyperLayerNorm(_HyperNorm, nn.LayerNorm):
    """Made by :func:`best_response`; see :class:`_HyperNorm`."""

    plain = nn.LayerNorm


class HyperGroupNorm(_HyperNorm, nn.GroupNorm):
    """Made by :func:`best_response`; see :class:`_HyperNorm`."""

    plain = nn.GroupNorm


class HyperBatchNorm1d(_HyperNorm, nn.BatchNorm1d):
    """Made by :func:`best_response`; see :class:`_HyperNorm`."""

    plain = nn.BatchNorm1d


class HyperBatchNorm2d(_HyperNorm, nn.BatchNorm2d):
    """Made by :func:`best_response`; see :class:`_HyperNorm`."""

    plain = nn.BatchNorm2d
