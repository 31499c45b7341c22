"""An outer step: the hypergradient of every hyperparameter, and the move of an optimizer along it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_nested.hypergradient.implicit import (
    ImplicitResult,
    Inspect,
    Otherwise,
    Penalty,
    implicit_result,
)
from lightning_nested.hypergradient.inner_curvature import AnyCurvature, Curvature, Loss, Mixed
from lightning_nested.hyperparameters.hyperparameter import Hyperparameter
from lightning_nested.hyperparameters.outer_optimizer import (
    OuterOptimizer,
    OuterScheduler,
    default_outer_optimizer,
    described,
)
from lightning_nested.hyperparameters.outer_report import OuterReport
from lightning_nested.hyperparameters.outer_state import OuterState
from lightning_nested.hyperparameters.vector import labelled
from lightning_nested.hyperparameters.weight_decay import FixedDecay
from lightning_nested.linalg.graph import explain_double_backward
from lightning_nested.linalg.operators import FlatOperator, LinearOperator
from lightning_nested.linalg.processes import Reduce, agreed_number, average
from lightning_nested.linalg.solvers.base import InverseSolver
from lightning_nested.linalg.solvers.given import AnySolver
from lightning_nested.linalg.vectors import Vector, clone, norm, zeros_where_none


def _check_types(hyperparameters: object, solver: object, curvature: object) -> None:
    if isinstance(hyperparameters, str) or not isinstance(hyperparameters, Iterable):
        raise TypeError(f"hyperparameters must be a list of objects. Got {described(hyperparameters)}.")
    for hyperparameter in hyperparameters:
        if not isinstance(hyperparameter, Hyperparameter):
            raise TypeError(
                "hyperparameters must be Hyperparameter objects, such as WeightDecay(). "
                f"Got {described(hyperparameter)}."
            )
    operators = (LinearOperator, FlatOperator, type(None))
    for name, value, kind, example in (
        ("solver", solver, InverseSolver, "Neumann()"),
        ("curvature", curvature, Curvature, "Hessian()"),
    ):
        if isinstance(value, type) or not isinstance(value, (kind, *operators)):
            raise TypeError(
                f"{name} must be an object such as {example}, or any with `A @ v` on a flat vector. "
                f"Got {described(value)}."
            )


@contextmanager
def _explain_changed_weights() -> Iterator[None]:
    """Name the cure where a graph through training steps needs weights as they were before a step."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "The graph through the training steps needs a tensor that has changed since: a checkpointed submodule "
            "(torch.utils.checkpoint) is computed again with the current weights, or the inner loss writes into a "
            f"tensor. Got: {str(error).split('; expected')[0]}. Turn checkpointing off (and lower num_steps or "
            "truncate to save memory), or use Implicit()."
        ) from error


def _penalized_norm(
    gradient: Vector, penalties: Sequence[Penalty], parameters: Mapping[str, Tensor]
) -> float:
    """Return the norm of the gradient of the inner loss with its penalties."""
    gradient, weights = clone(gradient), tuple(p.detach() for p in parameters.values())
    for penalty in penalties:
        penalty.curvature().add_product_(gradient, weights)
    return float(norm(gradient))


def _finite_mean(outer_loss: Tensor, reduce: Reduce | None) -> float:
    if outer_loss.numel() != 1:
        raise ValueError(f"outer_loss must be a scalar. Got shape {tuple(outer_loss.shape)}; take its mean.")
    mean = agreed_number(outer_loss.detach().clone(), reduce)
    if not math.isfinite(mean):
        raise FloatingPointError(f"The outer loss must be finite. Got {mean}.")
    return mean


class OuterStep(OuterState):
    """Hyperparameters, their optimizer and the solver's state.

    ``compute`` finds the hypergradients at the current weights and holds them; ``apply`` moves the hyperparameters.
    Two calls, because the training loss's graph may still need the old values in between.
    A deep copy continues on its own; to pickle one, ``optimizer`` and ``scheduler`` must be functions with a name.

    Args:
        hyperparameters: Hyperparameters to tune; names must differ.
        optimizer: Function from the list of unconstrained tensors to a torch optimizer.
        scheduler: Function from that optimizer to a learning-rate scheduler, stepped once per outer step.
        solver: See :func:`implicit_hypergradient`.
        curvature: See :func:`implicit_hypergradient`.

    Attributes:
        unreached: Hyperparameters, as in :meth:`values`, that no loss of the last outer step depends on.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: No hyperparameters, or equal names; in :meth:`build`, an optimizer that needs the loss again or a
            scheduler that needs a metric.
    """

    def __init__(
        self,
        hyperparameters: Sequence[Hyperparameter],
        *,
        optimizer: OuterOptimizer = default_outer_optimizer,
        scheduler: OuterScheduler | None = None,
        solver: AnySolver = None,
        curvature: AnyCurvature = None,
    ) -> None:
        _check_types(hyperparameters, solver, curvature)
        super().__init__(hyperparameters, optimizer=optimizer, scheduler=scheduler)
        self.solver, self.curvature = solver, curvature

    @property
    def unmoved(self) -> list[str]:
        """Names of hyperparameters in the losses' graphs whose hypergradients were exactly zero in all outer steps."""
        return [
            h.name
            for h in (*self.in_graph, *self.options)
            if self._moved.isdisjoint(labelled(h.name, h.tensors))
        ]

    def compute(
        self,
        inner_loss: Loss,
        outer_loss: Tensor,
        parameters: Mapping[str, Tensor],
        *,
        curvature: AnyCurvature = None,
        fixed_decay: Sequence[float] = (),
        reduce: Reduce | None = None,
        inner_scale: float = 1.0,
        compare_identity: bool = False,
        measure_gradient: bool = True,
        solver: AnySolver = None,
        weights: Mapping[str, Tensor] | None = None,
        decay_factors: Mapping[str, Tensor] | None = None,
        inspect: Inspect | None = None,
        mixed: Mixed | None = None,
        otherwise: Otherwise | None = None,
    ) -> OuterReport:
        """Find the hypergradients by :func:`implicit_result`, and hold them for :meth:`apply`.

        Args:
            inner_loss: Training loss without the weight decays, or a function that returns it.
            outer_loss: Validation loss with its graph, which is freed.
            parameters: Inner parameters, named as in :meth:`build`.
            curvature: Curvature for this step in place of the one given at construction.
            fixed_decay: Weight decay that the inner optimizer adds itself, one number per parameter.
            reduce: Averages a tensor over processes.
            inner_scale: Factor that ``inner_loss`` carries.
            compare_identity: Fill ``identity_cosine`` of the report.
            measure_gradient: Fill ``inner_gradient_norm``, which takes a message as long as the parameters.
            solver: Solver for this step in place of the one given at construction.
            weights: Weights at which the penalties' mixed derivatives are taken; None: the current ones.
            decay_factors: Factors that make coupled decays of decoupled ones, by name.
            inspect: See :func:`implicit_result`.
            mixed: See :func:`implicit_result`.
            otherwise: See :func:`implicit_result`.

        Raises:
            FloatingPointError: The outer loss or the solve is not finite. Nothing has changed then.
        """
        self._pending = None
        mean = _finite_mean(outer_loss, reduce)
        penalties = self._penalties(weights or parameters, decay_factors or {}, fixed_decay)
        result = implicit_result(
            inner_loss,
            outer_loss,
            tuple(parameters.values()),
            self.in_graph_tensors,
            solver=solver if solver is not None else self.solver,
            curvature=curvature if curvature is not None else self.curvature,
            penalties=penalties,
            state=self.solver_state,
            reduce=reduce,
            inner_scale=inner_scale,
            allow_unused=True,
            compare_identity=compare_identity,
            keep_gradient=measure_gradient,
            inspect=inspect,
            mixed=mixed,
            otherwise=otherwise,
        )
        self.unreached = [self.graph_labels()[i] for i in result.unreached]
        report = self._hold_result(result, penalties, parameters, mean)
        self.solver_state = result.solution.state
        return report

    def _penalties(
        self, weights: Mapping[str, Tensor], factors: Mapping[str, Tensor], fixed_decay: Sequence[float]
    ) -> list[Penalty]:
        penalties: list[Penalty] = [decay.linearize(weights, factors) for decay in self.decays]
        return penalties + ([FixedDecay(fixed_decay)] if any(fixed_decay) else [])

    def _hold_result(
        self,
        result: ImplicitResult,
        penalties: Sequence[Penalty],
        parameters: Mapping[str, Tensor],
        outer_loss: float,
    ) -> OuterReport:
        inner, solution = result.inner_gradient, result.solution
        decays = (t for decay in self.decays for t in decay.tensors.values())
        found = dict(zip(map(id, (*self.in_graph_tensors, *decays)), result.gradients, strict=True))
        return self._hold(
            tuple(found[id(t)] if id(t) in found else torch.zeros_like(t) for t in self.tensors),
            outer_loss=outer_loss,
            inner_gradient_norm=math.nan if inner is None else _penalized_norm(inner, penalties, parameters),
            residual=solution.residual,
            iterations=solution.iterations,
            curvature=solution.curvature,
            negative_curvature=solution.status == "negative_curvature",
            identity_cosine=result.identity_cosine,
        )

    def compute_unrolled(
        self, outer_loss: Tensor, *, reduce: Reduce | None = None, inner_gradient_norm: float = math.nan
    ) -> OuterReport:
        """Find the hypergradients by differentiating ``outer_loss`` itself, and hold them for :meth:`apply`.

        The graph of ``outer_loss`` leads back through training steps to the hyperparameters; it is freed.

        Raises:
            ValueError: The graph reaches no hyperparameter.
            FloatingPointError: The outer loss or a hypergradient is not finite. Nothing has changed then.
        """
        self._pending = None
        mean = _finite_mean(outer_loss, reduce)
        with explain_double_backward(), _explain_changed_weights():
            found = torch.autograd.grad(outer_loss, self.tensors, allow_unused=True)
        if all(g is None for g in found):
            raise ValueError(
                "The outer loss must depend on at least one hyperparameter, through the training steps or directly. "
                f"Got none of {[h.name for h in self.hyperparameters]}: does the inner loss read them?"
            )
        self.unreached = [label for label, g in zip(self.labels(), found, strict=True) if g is None]
        return self.hold(found, mean, reduce=reduce, inner_gradient_norm=inner_gradient_norm)

    def hold(
        self,
        gradients: Sequence[Tensor | None],
        outer_loss: float,
        *,
        reduce: Reduce | None = None,
        inner_gradient_norm: float = math.nan,
    ) -> OuterReport:
        """Hold hypergradients that were found elsewhere for :meth:`apply`.

        Args:
            gradients: One per tensor of :attr:`tensors`, from this process; None where the outer loss does not depend.
            outer_loss: Mean over processes, for the report.
            reduce: Averages a tensor over processes.
            inner_gradient_norm: Number for the report.

        Raises:
            FloatingPointError: A hypergradient is not finite. Nothing has changed then.
        """
        self._pending = None
        hypergradient = average(zeros_where_none(gradients, self.tensors), reduce)
        return self._hold(hypergradient, outer_loss=outer_loss, inner_gradient_norm=inner_gradient_norm)

    def compute_options(
        self, gradients: Sequence[Tensor], outer_loss: Tensor, *, reduce: Reduce | None = None
    ) -> OuterReport:
        """Hold hypergradients of the optimizer's options for :meth:`apply`, beside those that are held already.

        Args:
            gradients: One per tensor of :attr:`options`, from this process.
            outer_loss: The loss that they are derivatives of, on this process.
            reduce: Averages a tensor over processes.

        Raises:
            FloatingPointError: The outer loss or a hypergradient is not finite. Nothing is held then.
        """
        held, self._pending = self._pending, None
        mean = _finite_mean(outer_loss, reduce)
        own = [t for option in self.options for t in option.tensors.values()]
        found = dict(zip(map(id, own), average(tuple(gradients), reduce), strict=True))
        held = held or tuple(torch.zeros_like(t) for t in self.tensors)
        pairs = zip(self.tensors, held, strict=True)
        return self._hold(tuple(found.get(id(t), other) for t, other in pairs), outer_loss=mean)

    def _hold(self, hypergradient: Vector, **found: Any) -> OuterReport:
        size = float(norm(hypergradient))
        if not math.isfinite(size):
            raise FloatingPointError(f"The hypergradient must be finite. Got norm {size}.")
        self._pending = hypergradient
        for label, gradient in zip(self.labels(), hypergradient, strict=True):
            if label not in self._moved and bool(gradient.any()):
                self._moved.add(label)
        return OuterReport(hypergradient_norm=size, **found)

    @property
    def pending(self) -> bool:
        """True if hypergradients are held that :meth:`apply` has not used."""
        return self._pending is not None

    def apply(self) -> None:
        """Move the hyperparameters along the held hypergradients, then into their transforms' ranges."""
        if self._pending is None:
            return
        for tensor, gradient in zip(self.tensors, self._pending, strict=True):
            tensor.grad = gradient.to(tensor.dtype)
        self._optimization.step()
        self.clear_gradients()
        for hyperparameter in self.hyperparameters:
            hyperparameter.project_()
        self._pending = None

    def discard(self) -> None:
        """Drop the held hypergradients."""
        self._pending = None

    def clear_gradients(self) -> None:
        """Drop the gradients that a backward pass of the training loss left on the hyperparameters."""
        for tensor in self.tensors:
            tensor.grad = None
