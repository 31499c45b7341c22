"""Strategies for the inner Hessian: exact, Gauss-Newton, by finite differences, or given by the user."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_nested.arguments import checked, positive
from lightning_nested.linalg.curvature import (
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    HessianOperator,
    gradient_with_graph,
)
from lightning_nested.linalg.differences import central_difference, difference_length
from lightning_nested.linalg.graph import HIDDEN, explain_double_backward, hides_layers, refuse_sparse, vjp
from lightning_nested.linalg.operators import FlatOperator, LinearOperator, as_operator
from lightning_nested.linalg.vectors import Vector

Loss: TypeAlias = Tensor | Callable[[], Tensor]
Mixed: TypeAlias = Callable[[Vector, Vector], tuple[Tensor | None, ...]]
"""(v, λ) → vᵀ ∂²L_T/∂w∂λ for each hyperparameter; None where the inner gradient does not depend on it."""


@dataclass(frozen=True, eq=False)
class Linearization:
    """The inner problem around its current parameters: a curvature, and products with the mixed derivative."""

    curvature: LinearOperator
    gradient: Vector  # ∂L_T/∂w, detached
    mixed: Mixed
    scaled: bool = True  # whether the curvature carries the factor of the loss, if it has one


def _by_graph(curvature: LinearOperator, graph: Vector, *, scaled: bool = True) -> Linearization:
    """Take mixed derivatives by one more pass through the kept graph of the gradient."""

    def mixed(v: Vector, hparams: Vector) -> tuple[Tensor | None, ...]:
        with explain_double_backward():
            return vjp(graph, hparams, v, retain_graph=True)

    return Linearization(curvature, tuple(g.detach() for g in graph), mixed, scaled)


class Curvature(ABC):
    """Strategy for the matrix in place of the inner Hessian, and for its products."""

    @abstractmethod
    def linearize(self, inner_loss: Loss, params: Vector) -> Linearization:
        """Prepare products around the parameters' current values."""


def _tensor(inner_loss: Loss) -> Tensor:
    return inner_loss if isinstance(inner_loss, Tensor) else inner_loss()


@dataclass(frozen=True, kw_only=True)
class Hessian(Curvature):
    """The exact Hessian through the kept graph of the gradient; see :class:`HessianOperator`."""

    def linearize(self, inner_loss: Loss, params: Vector) -> Linearization:
        """Compute one gradient with its graph."""
        operator = HessianOperator(_tensor(inner_loss), params)
        return _by_graph(operator, operator.gradient)


@checked
@dataclass(frozen=True, kw_only=True)
class GaussNewton(Curvature):
    """The generalised Gauss-Newton matrix; see :class:`GaussNewtonOperator`.

    Args:
        outputs: The tensor the inner loss is convex in, usually the logits; in a callback the dotted name of the
            submodule that returns it.
    """

    outputs: Tensor | str

    def linearize(self, inner_loss: Loss, params: Vector) -> Linearization:
        """Compute one gradient with its graph for the mixed derivative, one pull-back with its graph for J."""
        if isinstance(self.outputs, str):
            raise TypeError(
                f"GaussNewton(outputs=...) needs the tensor itself here. Got the name {self.outputs!r}: names are "
                "resolved by HypergradientCallback."
            )
        loss = _tensor(inner_loss)
        operator = GaussNewtonOperator(loss, self.outputs, params)
        return _by_graph(operator, gradient_with_graph(loss, params))


@checked
@dataclass(frozen=True, kw_only=True)
class FiniteDifference(Curvature):
    """The Hessian and the mixed derivative by central differences of gradients: no second derivative is taken.

    Two gradients a product. The inner loss must be given as a function, with its noise and statistics frozen.

    Args:
        epsilon: Length of the move relative to ``1 + ‖w‖``; None: measured along the outer gradient, where truncation
            and rounding balance, see :func:`calibrated_length`: about 0.003 in float32, 0.1 under bfloat16 autocast,
            whatever ‖w‖ is. That takes about 6 to 12 gradients at outer steps 1, 2, 4, 8 and so on.
    """

    epsilon: float | None = None

    def __post_init__(self) -> None:
        positive(epsilon=self.epsilon)

    def linearize(self, inner_loss: Loss, params: Vector) -> Linearization:
        """Compute one gradient."""
        if isinstance(inner_loss, Tensor):
            raise TypeError(
                "FiniteDifference() evaluates the inner loss again: inner_loss must be a function without arguments "
                f"that returns it. Got a {type(inner_loss).__name__}."
            )
        value = inner_loss()
        if hides_layers(value):
            raise RuntimeError(HIDDEN)
        length = difference_length(params, value)
        gradient = _gradient(value, params)
        operator = FiniteDifferenceOperator(
            lambda: _gradient(inner_loss(), params), params, epsilon=self.epsilon, length=length
        )

        def mixed(v: Vector, hparams: Vector) -> tuple[Tensor | None, ...]:
            seen = torch.autograd.grad(inner_loss(), hparams, allow_unused=True) if hparams else ()
            live = tuple(h for h, g in zip(hparams, seen, strict=True) if g is not None)
            if not live:
                return (None,) * len(hparams)
            found = central_difference(lambda: _gradient(inner_loss(), live), params, v, operator.length)
            products = iter(found)
            return tuple(None if g is None else next(products) for g in seen)

        return Linearization(operator, gradient, mixed)


def _gradient(loss: Tensor, inputs: Vector) -> Vector:
    gradient = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    refuse_sparse(gradient)
    return gradient


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenCurvature(Curvature):
    """A curvature that the user brings: any object with ``A @ v`` on a flat vector.

    Mixed derivatives are those of the inner loss. The curvature knows nothing of a factor that the loss carries.
    """

    operator: LinearOperator | FlatOperator

    def linearize(self, inner_loss: Loss, params: Vector) -> Linearization:
        """Compute one gradient with its graph for the mixed derivative."""
        graph = gradient_with_graph(_tensor(inner_loss), params)
        return _by_graph(as_operator(self.operator, params), graph, scaled=False)


AnyCurvature: TypeAlias = Curvature | LinearOperator | FlatOperator | None
"""A strategy, an operator with ``@`` in place of the Hessian, or None for ``Hessian()``."""


def as_curvature(curvature: AnyCurvature) -> Curvature:
    """Return a strategy itself, ``Hessian()`` for None, any other object with ``@`` as the curvature."""
    if curvature is None:
        return Hessian()
    return curvature if isinstance(curvature, Curvature) else GivenCurvature(operator=curvature)
