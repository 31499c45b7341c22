"""An outer step: the hypergradient of every hyperparameter, and the move of an optimizer along it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_nested.hypergradient.implicit import Inspect, Penalty, implicit_result
from lightning_nested.hypergradient.inner_curvature import AnyCurvature, Curvature, Loss
from lightning_nested.hyperparameters.carry_over import Names
from lightning_nested.hyperparameters.hyperparameter import Hyperparameter
from lightning_nested.hyperparameters.outer_optimizer import (
    OptimizerPair,
    OuterOptimizer,
    OuterScheduler,
    default_outer_optimizer,
    described,
)
from lightning_nested.hyperparameters.outer_report import OuterReport, Spread, spread
from lightning_nested.hyperparameters.saved_values import (
    Placed,
    load_hyperparameters,
    saved_hyperparameters,
    saved_parameters,
)
from lightning_nested.hyperparameters.vector import labelled
from lightning_nested.hyperparameters.weight_decay import FixedDecay, WeightDecay
from lightning_nested.linalg.graph import explain_double_backward
from lightning_nested.linalg.operators import FlatOperator, LinearOperator
from lightning_nested.linalg.processes import Reduce, agreed_number, average
from lightning_nested.linalg.saved import require_keys
from lightning_nested.linalg.solvers.base import InverseSolver, Solution, SolverState
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


def _penalized(gradient: Vector, penalties: Sequence[Penalty], parameters: Mapping[str, Tensor]) -> Vector:
    """Return the gradient of the inner loss with its penalties."""
    gradient, weights = clone(gradient), tuple(p.detach() for p in parameters.values())
    for penalty in penalties:
        penalty.curvature().add_product_(gradient, weights)
    return gradient


def _numbers(solution: Solution) -> dict[str, Any]:
    """Return what an :class:`OuterReport` says about a solve."""
    negative = solution.status == "negative_curvature"
    return {
        "residual": solution.residual,
        "iterations": solution.iterations,
        "curvature": solution.curvature,
        "negative_curvature": negative,
    }


def _finite_mean(outer_loss: Tensor, reduce: Reduce | None) -> float:
    if outer_loss.numel() != 1:
        raise ValueError(f"outer_loss must be a scalar. Got shape {tuple(outer_loss.shape)}; take its mean.")
    mean = agreed_number(outer_loss.detach().clone(), reduce)
    if not math.isfinite(mean):
        raise FloatingPointError(f"The outer loss must be finite. Got {mean}.")
    return mean


class OuterStep:
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
        names = [h.name for h in hyperparameters]
        if not names:
            raise ValueError("hyperparameters must hold at least one. Got none; give [WeightDecay()], say.")
        if len(set(names)) != len(names):
            raise ValueError(f"hyperparameters must have different names. Got {names}; set name=...")
        self.hyperparameters = tuple(hyperparameters)
        # A decay's derivatives are known in closed form: it needs no place in the graph of the inner loss.
        self.decays = tuple(h for h in hyperparameters if isinstance(h, WeightDecay))
        self.in_graph = tuple(h for h in hyperparameters if h not in self.decays)
        self.solver, self.curvature = solver, curvature
        self.solver_state = SolverState()
        self.unreached: list[str] = []
        self._optimization = OptimizerPair(optimizer, scheduler)
        self._pending: Vector | None = None
        self._moved: set[str] = set()
        self.first: dict[str, Spread] = {}  # of the values that each hyperparameter started from
        self._inner: dict[str, Placed] = {}  # the parameters in `build`

    @property
    def unmoved(self) -> list[str]:
        """Names of hyperparameters in the losses' graphs whose hypergradients were exactly zero in all outer steps."""
        return [h.name for h in self.in_graph if self._moved.isdisjoint(labelled(h.name, h.tensors))]

    def _labels(self) -> list[str]:
        """Return the name of each of :attr:`tensors`, as in :meth:`values`."""
        return [label for h in (*self.in_graph, *self.decays) for label in labelled(h.name, h.tensors)]

    @property
    def optimizer(self) -> Optimizer:
        """The outer optimizer, once built."""
        return self._optimization.optimizer

    @property
    def scheduler(self) -> LRScheduler | None:
        """The outer scheduler, once built, if there is one."""
        return self._optimization.scheduler

    def set_optimizer(self, optimizer: OuterOptimizer, scheduler: OuterScheduler | None) -> None:
        """Take another optimizer and schedule; one that runs goes on with its state, at the new rate."""
        self._optimization.replace(optimizer, scheduler)

    def build(self, parameters: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Create the tensors and the optimizer over all of them, or continue with those there are.

        A second call with the same parameters changes nothing. Where parameters were added (a layer was unfrozen) or
        removed, hyperparameters of those that stay keep their values and the optimizer's state, the rest starts at
        its initial value, and the solver's state is dropped. Where none stays, or one has another shape, the
        parameters are those of another model: all of this object starts again, as after :meth:`reset`.

        Raises:
            ValueError: A parameter is complex.
        """
        if complex_ones := [f"{name} ({p.dtype})" for name, p in parameters.items() if p.is_complex()]:
            raise ValueError(
                f"Inner parameters must be real. Got {', '.join(complex_ones)}: freeze them, or make the parameter "
                "of their real and imaginary parts (torch.view_as_real), and use torch.view_as_complex on it."
            )
        inner = {name: (p.shape, p.dtype, p.device) for name, p in parameters.items()}
        shared = inner.keys() & self._inner.keys()
        if self._inner and (not shared or any(inner[name][0] != self._inner[name][0] for name in shared)):
            self.reset()
        if list(inner.items()) != list(self._inner.items()):  # another space, if only by the order
            self.solver_state = SolverState()
        self._inner = inner
        earlier = self._located()
        for hyperparameter in self.hyperparameters:
            hyperparameter.build(parameters, device)
        if not self._optimization.holds(self.tensors):
            self._pending = None
            located = self._located()
            origins = {t: (*earlier[at], names) for at, (t, names) in located.items() if at in earlier}
            self._optimization.carry_over(self.tensors, origins)
        self.first = {h.name: self.first.get(h.name) or spread(h.values()) for h in self.hyperparameters}

    def is_built_for(self, parameters: Mapping[str, Tensor]) -> bool:
        """Return True if the last :meth:`build`, or what was loaded, is of parameters with these names."""
        return len(parameters) == len(self._inner) and all(map(operator.eq, parameters, self._inner))

    def _located(self) -> dict[tuple[str, str], tuple[Tensor, Names]]:
        """Return each tensor and the names of its entries, by its hyperparameter and key."""
        return {(h.name, key): (t, h.entries()) for h in self.hyperparameters for key, t in h.tensors.items()}

    def reset(self) -> None:
        """Forget all values, the optimizer and the solver's state: the next :meth:`build` starts from the beginning."""
        for hyperparameter in self.hyperparameters:
            hyperparameter.reset()
        self._optimization.forget()
        self.solver_state, self._pending, self._inner, self.first = SolverState(), None, {}, {}
        self.unreached, self._moved = [], set()

    @property
    def tensors(self) -> Vector:
        """All unconstrained tensors: those in the loss's graph first, then the decays'."""
        return tuple(t for h in (*self.in_graph, *self.decays) for t in h.tensors.values())

    @property
    def in_graph_tensors(self) -> Vector:
        """Unconstrained tensors that losses depend on through their graphs."""
        return tuple(t for h in self.in_graph for t in h.tensors.values())

    def values(self) -> dict[str, Tensor]:
        """Values in natural units: ``name``, or ``name/key`` where a hyperparameter has several tensors."""
        return {label: v for h in self.hyperparameters for label, v in labelled(h.name, h.values()).items()}

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
        solver: AnySolver = None,
        weights: Mapping[str, Tensor] | None = None,
        decay_factors: Mapping[str, Tensor] | None = None,
        inspect: Inspect | None = None,
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
            solver: Solver for this step in place of the one given at construction.
            weights: Weights at which the penalties' mixed derivatives are taken; None: the current ones.
            decay_factors: Factors that make coupled decays of decoupled ones, by name.
            inspect: See :func:`implicit_result`.

        Raises:
            FloatingPointError: The outer loss or the solve is not finite. Nothing has changed then.
        """
        self._pending = None
        mean = _finite_mean(outer_loss, reduce)
        penalties: list[Penalty] = [
            decay.linearize(weights or parameters, decay_factors or {}) for decay in self.decays
        ]
        penalties += [FixedDecay(fixed_decay)] if any(fixed_decay) else []
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
            inspect=inspect,
        )
        self.unreached = [self._labels()[i] for i in result.unreached]
        inner, solution = result.inner_gradient, result.solution
        size = math.nan if inner is None else float(norm(_penalized(inner, penalties, parameters)))
        report = self._hold(
            result.gradients,
            outer_loss=mean,
            inner_gradient_norm=size,
            **_numbers(solution),
            identity_cosine=result.identity_cosine,
        )
        self.solver_state = solution.state
        return report

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
        self.unreached = [label for label, g in zip(self._labels(), found, strict=True) if g is None]
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

    def _hold(self, hypergradient: Vector, **found: Any) -> OuterReport:
        size = float(norm(hypergradient))
        if not math.isfinite(size):
            raise FloatingPointError(f"The hypergradient must be finite. Got norm {size}.")
        self._pending = hypergradient
        for label, gradient in zip(self._labels(), hypergradient, strict=True):
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

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next outer step depends on, with values in natural units; loads with ``weights_only``."""
        return {
            **saved_hyperparameters(self.hyperparameters),
            "first": self.first,
            "inner": {name: list(shape) for name, (shape, _, _) in self._inner.items()},
            **self._optimization.state_dict(),
            "solver": self.solver_state.state_dict(),
        }

    def load_state_dict(
        self, state: Mapping[str, Any], parameters: Mapping[str, Tensor], *, convert: bool = True
    ) -> list[str]:
        """Restore; :meth:`build` must have run, with the hyperparameters of the state.

        Values saved under another range or transform are converted, an outer optimizer or scheduler of another class
        starts again. Where layers were frozen or unfrozen since :meth:`build`, this object takes the saved
        parameters' hyperparameters: :meth:`is_built_for` returns False, and the next :meth:`build` carries over.

        Args:
            state: What :meth:`state_dict` returned.
            parameters: Inner parameters by name.
            convert: Convert values; False: refuse another range or transform, and another order.

        Returns:
            Messages for the user: all that was converted, or started again.

        Raises:
            ValueError: Other hyperparameters, or of another kind, out of range, or of another model.
        """
        require_keys(state, ("hyperparameters", "optimizer", "scheduler", "solver"), "the outer steps")
        saved = state["hyperparameters"]
        own = {h.name: h for h in self.hyperparameters}
        if set(saved) != set(own) or (not convert and list(saved) != list(own)):
            raise ValueError(
                f"The saved hyperparameters must be {list(own)}. Got {list(saved)}: the checkpoint was written with "
                "others."
            )
        inner = saved_parameters(state.get("inner"), self._inner)
        self._pending = None
        messages, converted = load_hyperparameters(self.hyperparameters, state, convert=convert)
        ordered = sorted((own[name] for name in saved), key=self.decays.__contains__)
        tensors = [h.tensors[key] for h in ordered for key in saved[h.name]]
        messages += self._optimization.load_state_dict(state, tensors, converted)
        self._inner, self.first = inner, {**self.first, **state.get("first", {})}
        like = tuple(torch.empty(0, device=device) for _, _, device in inner.values())
        self.solver_state.load_state_dict(state["solver"], like or tuple(parameters.values()))
        return messages

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._optimization.resume(self.tensors)
