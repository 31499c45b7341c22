"""Layers whose weights respond to hyperparameters: W(h) = W₀ + diag(V h) W₁, one row of W per output unit.

MacKay, Vicol, Lorraine, Duvenaud & Grosse (2019), ICLR, arXiv 1903.03088 (Self-Tuning Networks); linearized:
Bae & Grosse (2020), NeurIPS, arXiv 2010.13514 (Delta-STN).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.hypernetworks.layers.arithmetic import linearly_moved, moved, total, unpack_dual


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
        """weight + Δ(h), in one pass."""
        return torch.addcmul(weight, self._of_rows(delta), self.direction)

    def inner(self, delta: Tensor, gradient: Tensor) -> Tensor:
        """⟨Δ(h), gradient⟩ without forming Δ; scalar."""
        rows = self.scale.shape[0]
        direction, gradient = (t.reshape(rows, -1) for t in (self.direction, gradient.to(self.direction)))
        return torch.dot(self.coefficients(delta), torch.linalg.vecdot(direction, gradient))

    def _of_rows(self, delta: Tensor) -> Tensor:
        shape = (-1, *(1,) * (self.direction.dim() - 1)) if self.direction.dim() else ()
        return self.coefficients(delta).reshape(shape)


class OnePointError(ValueError):
    """A layer, or the way a network uses it, cannot evaluate the points it was given."""


@dataclass(eq=False)
class Point:
    """Hyperparameters at which the layers of one converted module are evaluated; the layers share it.

    Attributes:
        batch_dim: Dimension of the examples in the inputs of linear layers and embeddings.
        delta: h − center of each example (batch, n), or (n,) of all; None: the layers are plain.
        linearized: Return the first-order change of the output; see :meth:`Response.at`.
        visited: Number of calls of each layer, by its id.
        inside: True during a layer's call.
        read: Parameters that were read from layers outside their calls.
    """

    batch_dim: int = 0
    delta: Tensor | None = None
    linearized: bool = False
    visited: Counter[int] = field(default_factory=Counter)
    inside: bool = False
    read: list[str] = field(default_factory=list)

    @contextmanager
    def at(self, delta: Tensor, linearized: bool) -> Iterator[None]:
        """Move the layers to ``delta``, and count their calls and the reads of their parameters from zero."""
        self.delta, self.linearized = delta, linearized
        self.visited.clear()
        self.read.clear()
        try:
            yield
        finally:
            self.delta, self.linearized = None, False


if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class HyperLayer(_Base):
    """Behaviour that the layers share; mixed into a class of ``torch.nn``, whose parameters keep their names.

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
        """Give each parameter its response; ``shared`` holds those so far by the parameter's id, for shared weights."""
        known = {} if shared is None else shared
        for name, parameter in list(self.named_parameters(recurse=False)):
            if parameter.requires_grad:
                if id(parameter) not in known:
                    known[id(parameter)] = RowResponse(parameter, num_hyperparameters)
                self.add_module(f"{name}_response", known[id(parameter)])
        self._point = point
        self.num_hyperparameters = num_hyperparameters

    def __getattr__(self, name: str) -> Any:
        # A parameter read past the layer is noted: the layer's rule cannot reach it there.
        value = super().__getattr__(name)
        point = self.__dict__.get("_point")
        if point and point.delta is not None and not point.inside and isinstance(value, nn.Parameter):
            point.read.append(name)
        return value

    def revert(self) -> None:
        """Become the plain layer again, with the current weights."""
        for name in [name for name in self._modules if name.endswith("_response")]:
            del self._modules[name]
        self.__dict__.pop("_point", None)
        self.__dict__.pop("num_hyperparameters", None)
        self.__class__ = self.plain  # type: ignore[assignment]

    def response_of(self, name: str) -> RowResponse | None:
        """Return the response of a parameter; None where it has none."""
        return cast("RowResponse | None", self._modules.get(f"{name}_response"))

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """Return the layer's output for one h, or one of each example."""
        return cast("Tensor", self._call(self._per_example, x, h))

    def _per_example(self, x: Tensor, delta: Tensor, linearized: bool) -> Tensor:
        """Return the output for ``delta`` (batch, n), or (n,); each layer has a rule that forms no weights."""
        raise NotImplementedError

    def _call(
        self, per_example: Callable[[Tensor, Tensor, bool], Any], x: Any, h: Tensor | None, *rest: Any
    ) -> Any:
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
        responses = ((name, p, self.response_of(name)) for name, p in self.named_parameters(recurse=False))
        weights = {name: r.added_to(p, h) for name, p, r in responses if r is not None}
        # The substituted call comes back without h, as one inside a converted module does.
        held, self._point = point, Point()
        try:
            return torch.func.functional_call(self, weights, (x, *rest))
        finally:
            self._point = held

    def _plain(self, x: Any, *rest: Any) -> Any:
        return self.plain.forward(self, x, *rest)

    @property
    def _batch_dim(self) -> int:
        return self._point.batch_dim if self._point is not None else 0

    def _shift(self, delta: Tensor, *names: str) -> Tensor | None:
        """Return the change of the sum of these vectors, (batch, rows) or (rows,); None where none responds."""
        responses = (self.response_of(name) for name in names)
        return total(*(r.coefficients(delta) * r.direction for r in responses if r is not None))

    def _responded(
        self,
        operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        x: Tensor,
        delta: Tensor,
        place: Callable[[Tensor], Tensor],
        linearized: bool,
        weight: str = "weight",
        biases: Sequence[str] = ("bias",),
    ) -> Tensor:
        """``operation(x, W(h_i), b(h_i))`` for each example i, from two operations with the weights of all.

        ``operation`` is bilinear in x and the weight, one row of it per output, and adds the bias b, the sum of the
        vectors named ``biases``. ``place`` takes coefficients (batch, rows) to a shape that broadcasts with the output.
        If linearized: the value W₀x + b₀ with the tangent of the response, and derivatives for V and W₁ alone; the
        mean output does not move, ``∂/∂V`` is that of the first-order change.
        """
        response, general = self.response_of(weight), getattr(self, weight)
        bias, shift = total(*(getattr(self, name) for name in biases)), self._shift(delta, *biases)
        coefficient = None if response is None else place(response.coefficients(delta))
        if not linearized and shift is not None:
            shift, bias = total(bias, shift), None  # both in one pass over the output
        placed = None if shift is None else place(shift)
        if not linearized:
            base = operation(x, general, bias)
            if response is None or coefficient is None:
                return base if placed is None else base + placed.to(base.dtype)
            return moved(base, coefficient, operation(x, response.direction, None), placed)
        value, tangent = unpack_dual(x)
        fixed = general.detach()
        base = operation(value, fixed, None if bias is None else bias.detach())
        # Detached: the response's own value is 0 here, so that only W₀ passes derivatives to the input.
        product = None if response is None else operation(value.detach(), response.direction, None)
        if tangent is not None:
            with torch.no_grad():  # by hand: torch's rule for linear layers copies the weight and the result
                tangent = operation(tangent, fixed, None)
        return linearly_moved(base, tangent, coefficient, product, placed)


def check_hyperparameters(h: Tensor, num_hyperparameters: int) -> None:
    """Refuse h unless it is (n,) or (batch, n)."""
    if h.dim() not in (1, 2) or h.shape[-1] != num_hyperparameters:
        raise ValueError(
            f"h must have shape ({num_hyperparameters},), or (batch, {num_hyperparameters}) for one point of each "
            f"example. Got {tuple(h.shape)}."
        )


def check_examples(x: Tensor, delta: Tensor, dim: int, layer: str, least: int = 2) -> None:
    """Refuse x unless it has one example for each row of h, or there is one point of all."""
    if delta.dim() == 2 and (x.dim() < max(dim + 1, least) or x.shape[dim] != len(delta)):
        raise OnePointError(
            f"x must have as many examples (dimension {dim}) as h has rows, {len(delta)}. Got shape "
            f"{tuple(x.shape)} in {layer}; give one h of shape (n,), or batch_dim= of best_response."
        )


def placement(dims: int, batch_dim: int, row_dim: int) -> Callable[[Tensor], Tensor]:
    """Return a map from (rows,) or (batch, rows) to a shape of ``dims`` dimensions that broadcasts with the output."""

    def place(c: Tensor) -> Tensor:
        shape = [1] * dims
        shape[row_dim] = c.shape[-1]
        if c.dim() == 2:
            shape[batch_dim] = c.shape[0]
        return c.reshape(shape)

    return place
