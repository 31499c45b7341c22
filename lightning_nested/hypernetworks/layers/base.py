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


def total(*terms: Tensor | None) -> Tensor | None:
    """Sum of the terms that are given; None where none is."""
    given = [t for t in terms if t is not None]
    return sum(given[1:], given[0]) if given else None


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


def placement(dims: int, batch_dim: int, row_dim: int) -> Callable[[Tensor], Tensor]:
    """From (rows,) or (batch, rows) to a shape of ``dims`` dimensions that broadcasts with the output."""

    def place(c: Tensor) -> Tensor:
        shape = [1] * dims
        shape[row_dim] = c.shape[-1]
        if c.dim() == 2:
            shape[batch_dim] = c.shape[0]
        return c.reshape(shape)

    return place
