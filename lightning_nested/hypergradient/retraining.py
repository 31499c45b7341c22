"""The inner parameters as a function of the hyperparameters, w*(λ), found by training again.

First derivatives only: what checks second derivatives must not rely on them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from lightning_nested.arguments import at_least, checked
from lightning_nested.hypergradient.arguments import as_scalar
from lightning_nested.hypergradient.schedule import RandomState
from lightning_nested.hypergradient.unrolled import Step
from lightning_nested.linalg.curvature import FiniteDifferenceOperator
from lightning_nested.linalg.solvers.conjugate_gradient import ConjugateGradient
from lightning_nested.linalg.vectors import Vector, add_, clone, norm

LossFunction: TypeAlias = Callable[[Vector, Vector], Tensor]

_HALVINGS = 6
_NEAR = 1e-3


@dataclass(frozen=True)
class Problem:
    """The losses with frozen random numbers, and leaves in the dtype of the check."""

    inner_loss: LossFunction
    outer_loss: LossFunction
    params: Vector
    hparams: Vector

    @classmethod
    def build(
        cls, inner: LossFunction, outer: LossFunction, params: Sequence[Tensor], hparams: Sequence[Tensor]
    ) -> Problem:
        """Use float64 if the losses accept it, otherwise the tensors' own dtype."""
        frozen = _frozen("inner_loss", inner, params), _frozen("outer_loss", outer, params)
        exact = cls(*frozen, _leaves(params, torch.float64), _leaves(hparams, torch.float64))
        if all(x.dtype == torch.float64 for x in (*params, *hparams)):
            return exact
        try:
            if all(loss(exact.params, exact.hparams).dtype == torch.float64 for loss in frozen):
                return exact
        except (RuntimeError, TypeError):  # the losses hold data of another dtype
            pass
        return cls(*frozen, _leaves(params, None), _leaves(hparams, None))

    def inner(self) -> Tensor:
        """Return L_T at the given point, with its graph."""
        return self.inner_loss(self.params, self.hparams)

    def outer(self) -> Tensor:
        """Return L_V at the given point, with its graph."""
        return self.outer_loss(self.params, self.hparams)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of every tensor."""
        return self.params[0].dtype

    @property
    def eps(self) -> float:
        """Machine epsilon of the dtype."""
        return torch.finfo(self.dtype).eps


def _leaves(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> Vector:
    return tuple(x.detach().clone().to(dtype=dtype or x.dtype).requires_grad_() for x in tensors)


def _frozen(name: str, loss: LossFunction, params: Sequence[Tensor]) -> LossFunction:
    fixed = RandomState(tuple(params))  # not manual_seed: it costs a millisecond a call

    def call(w: Vector, h: Vector) -> Tensor:
        before = RandomState(w)
        fixed.restore()
        try:
            value = as_scalar(name, loss(w, h))
        finally:
            before.restore()
        if not value.requires_grad and any(x.requires_grad for x in (*w, *h)):
            raise ValueError(
                f"{name} must depend on params or hparams. Got a value without a graph: compute it from its "
                "arguments, without detach() or torch.no_grad()."
            )
        return value

    return call


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """Trained parameters w*(λ), detached, and how far they are from the optimum."""

    params: Vector
    distance: float = 0.0  # length of the next Newton step over 1 + ‖w‖; 0 where there is no optimum to reach


class Response(ABC):
    """Strategy for w*(λ)."""

    stationary: ClassVar[bool] = True  # whether it ends where implicit differentiation holds

    def start(self, inner_loss: LossFunction, params: Vector, hparams: Vector) -> Vector:
        """Return the parameters to train from; by default those given."""
        return params

    @abstractmethod
    def train(self, inner_loss: LossFunction, start: Vector, hparams: Vector) -> Trained:
        """Train at ``hparams``, from ``start`` where the strategy has no start of its own."""


@checked
@dataclass(frozen=True, kw_only=True)
class Minimize(Response):
    """Minimize the inner loss: L-BFGS, then Newton steps that bring the gradient down to rounding.

    Liu & Nocedal (1989), Math. Program. 45:503-528. Newton systems are solved by conjugate gradient with
    products by central differences of gradients.

    Args:
        max_iterations: Largest number of iterations of L-BFGS.
        newton_steps: Largest number after it; they stop by themselves where the gradient no longer falls.
    """

    max_iterations: int = 1000
    newton_steps: int = 20

    def __post_init__(self) -> None:
        at_least(0, max_iterations=self.max_iterations, newton_steps=self.newton_steps)

    def start(self, inner_loss: LossFunction, params: Vector, hparams: Vector) -> Vector:
        """Return the minimum next to ``params``."""
        return self.train(inner_loss, params, hparams).params

    def train(self, inner_loss: LossFunction, start: Vector, hparams: Vector) -> Trained:
        """Find the minimum next to ``start``."""
        w = tuple(p.requires_grad_() for p in clone(start))
        fixed = tuple(h.detach() for h in hparams)

        def gradient() -> Vector:
            return torch.autograd.grad(inner_loss(w, fixed), w, allow_unused=True, materialize_grads=True)

        # From a point moved by rounding Newton needs two steps; from afar it could end at another point.
        if _distance(_newton_step(gradient, gradient(), w), w) > _NEAR:
            self._lbfgs(lambda: inner_loss(w, fixed), w)
        distance = self._newton(gradient, w)
        return Trained(params=tuple(p.detach() for p in w), distance=distance)

    def _lbfgs(self, loss: Callable[[], Tensor], w: Vector) -> None:
        eps = torch.finfo(w[0].dtype).eps
        optimizer = torch.optim.LBFGS(
            w,
            max_iter=self.max_iterations,
            tolerance_grad=eps,
            tolerance_change=eps,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            optimizer.zero_grad()
            value = loss()
            torch.autograd.backward(value, inputs=w)
            return value.item()

        optimizer.step(closure)  # type: ignore[no-untyped-call]

    def _newton(self, gradient: Callable[[], Vector], w: Vector) -> float:
        """Accept a step where the gradient falls; the loss itself is flat to rounding long before that."""
        g = gradient()
        for _ in range(self.newton_steps):
            step = _newton_step(gradient, g, w)
            if step is None:
                break
            length = 1.0
            for _ in range(_HALVINGS):
                with torch.no_grad():
                    add_(w, step, alpha=-length)
                moved = gradient()
                if float(norm(moved)) < float(norm(g)):
                    g = moved
                    break
                with torch.no_grad():
                    add_(w, step, alpha=length)
                length /= 2
            else:
                break  # down to rounding
        return _distance(_newton_step(gradient, g, w), w)


def _newton_step(gradient: Callable[[], Vector], g: Vector, w: Vector) -> Vector | None:
    """H⁻¹g; None where the curvature is not positive or the loss overflows."""
    solver = ConjugateGradient(max_iterations=500, tolerance=1e-5)
    try:
        solution = solver.solve(FiniteDifferenceOperator(gradient, w), g)
    except FloatingPointError:
        return None
    return None if solution.status == "negative_curvature" else solution.x


def _distance(step: Vector | None, w: Vector) -> float:
    size = 1.0 + float(norm(tuple(p.detach() for p in w)))
    return math.inf if step is None else float(norm(step)) / size


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
class Unroll(Response):
    """Run ``num_steps`` optimizer steps from the start, those that ``unrolled_hypergradient`` differentiates.

    Args:
        step: ``step(params, hparams, t) -> params``.
        num_steps: T ≥ 1.
    """

    step: Step
    num_steps: int
    stationary: ClassVar[bool] = False

    def train(self, inner_loss: LossFunction, start: Vector, hparams: Vector) -> Trained:
        """Return the parameters after the last step."""
        w, fixed = clone(start), tuple(h.detach() for h in hparams)
        for t in range(self.num_steps):
            w = tuple(p.detach() for p in self.step(tuple(p.requires_grad_() for p in w), fixed, t))
        return Trained(params=w)


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenResponse(Response):
    """Training that the user brings: ``retrain(hparams) -> params``."""

    retrain: Callable[[Vector], Sequence[Tensor]]

    def train(self, inner_loss: LossFunction, start: Vector, hparams: Vector) -> Trained:
        """Call ``retrain``; the parameters get the dtype of ``start``."""
        w = tuple(self.retrain(tuple(h.detach() for h in hparams)))
        if len(w) != len(start) or any(a.shape != b.shape for a, b in zip(w, start, strict=True)):
            raise ValueError(
                f"retrain must return tensors shaped as params, {[tuple(p.shape) for p in start]}. "
                f"Got {[tuple(p.shape) for p in w]}."
            )
        return Trained(params=tuple(a.detach().to(b) for a, b in zip(w, start, strict=True)))


AnyResponse: TypeAlias = Response | Callable[[Vector], Sequence[Tensor]] | None
"""A strategy, a function ``retrain(hparams) -> params``, or None for ``Minimize()``."""


def as_response(retrain: AnyResponse) -> Response:
    """Return a strategy itself, ``Minimize()`` for None, a function as :class:`GivenResponse`."""
    if retrain is None:
        return Minimize()
    return retrain if isinstance(retrain, Response) else GivenResponse(retrain=retrain)
