"""Strategies for the inner Hessian: exact, Gauss-Newton, by finite differences, or given by the user."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_nested.arguments import checked, positive
from lightning_nested.hypergradient.mixed_differences import mixed_difference
from lightning_nested.linalg.curvature import (
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    HessianOperator,
    gradient_with_graph,
    owned,
)
from lightning_nested.linalg.differences import coarsest_epsilon
from lightning_nested.linalg.first_derivatives import first_derivative
from lightning_nested.linalg.graph import depends_on_others, explain_double_backward, vjp
from lightning_nested.linalg.operators import FlatOperator, LinearOperator, as_operator
from lightning_nested.linalg.vectors import Vector, zeros_where_none

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
        """Compute one pull-back with its graph for J, and one gradient.

        The gradient has a graph, for the mixed derivative, only where the loss depends on more than ``params``.
        """
        if isinstance(self.outputs, str):
            raise TypeError(
                f"GaussNewton(outputs=...) needs the tensor itself here. Got the name {self.outputs!r}: names are "
                "resolved by HypergradientCallback."
            )
        loss = _tensor(inner_loss)
        operator = GaussNewtonOperator(loss, self.outputs, params)
        if depends_on_others(loss, params):
            return _by_graph(operator, gradient_with_graph(loss, params))
        gradient = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        return _by_graph(operator, zeros_where_none(gradient, params))


@checked
@dataclass(frozen=True, kw_only=True)
class FiniteDifference(Curvature):
    """The Hessian and the mixed derivative by differences of gradients: no second derivative is taken.

    One gradient a product in float32, where one-sided differences are right to 0.005, mostly to 0.001. Two in half
    precision, which rounds too much for them, and in double, whose digits they would lose; two for the mixed
    derivative. Not for ReLU with batch normalization: there gradients jump so often that no length serves. The inner
    loss must be given as a function, with its noise and statistics frozen.

    Args:
        epsilon: Length of the move relative to ``1 + ‖w‖``; None: measured along the outer gradient, where truncation
            and rounding balance, see :func:`calibrate`: about 0.001 in float32, 0.1 under bfloat16 autocast,
            whatever ‖w‖ is. That takes about 3 to 12 gradients at outer steps 1, 2, 4, 8 and so on.
        sides: 1: one-sided differences; 2: central ones; None: as said above, or 2 with ``epsilon``.

    Raises:
        ValueError: ``epsilon`` is not positive, or ``sides`` neither 1 nor 2.
    """

    epsilon: float | None = None
    sides: int | None = None

    def __post_init__(self) -> None:
        positive(epsilon=self.epsilon)
        if self.sides not in (None, 1, 2):
            raise ValueError(f"sides must be 1, 2 or None. Got {self.sides}.")

    def linearize(self, inner_loss: Loss, params: Vector) -> Linearization:
        """Compute one gradient."""
        if isinstance(inner_loss, Tensor):
            raise TypeError(
                "FiniteDifference() evaluates the inner loss again: inner_loss must be a function without arguments "
                f"that returns it. Got a {type(inner_loss).__name__}."
            )
        value = inner_loss()
        rounding = coarsest_epsilon(params, value)
        gradient = _gradient(value, params)
        operator = FiniteDifferenceOperator(
            lambda: _gradient(inner_loss(), params),
            params,
            epsilon=self.epsilon,
            here=gradient,
            sides=self.sides,
            rounding=rounding,
        )

        def mixed(v: Vector, hparams: Vector) -> tuple[Tensor | None, ...]:
            return mixed_difference(inner_loss, operator, params, v, hparams)

        return Linearization(operator, gradient, mixed)


def _gradient(loss: Tensor, inputs: Vector) -> Vector:
    # The memory of moved parameters is used again.
    return owned(first_derivative(loss, inputs), inputs, tuple(inputs))


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
