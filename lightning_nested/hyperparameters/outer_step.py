"""One outer step: the hypergradient of every hyperparameter, and the move of an optimizer along it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_nested.hypergradient.implicit import Curvature, Loss, Penalty, implicit_result
from lightning_nested.hyperparameters.carry_over import Names, carry_optimizer_
from lightning_nested.hyperparameters.hyperparameter import Hyperparameter
from lightning_nested.hyperparameters.weight_decay import WeightDecay
from lightning_nested.linalg.graph import explain_double_backward
from lightning_nested.linalg.operators import DiagonalOperator, FlatOperator, LinearOperator
from lightning_nested.linalg.solvers.base import InverseSolver, SolverState
from lightning_nested.linalg.solvers.neumann import Neumann
from lightning_nested.linalg.vectors import Reduce, Vector, average, dot, norm

OuterOptimizer: TypeAlias = Callable[[Iterable[Tensor]], Optimizer]
OuterScheduler: TypeAlias = Callable[[Optimizer], LRScheduler]


def default_outer_optimizer(tensors: Iterable[Tensor]) -> Optimizer:
    """Adam of rate 0.05 on the unconstrained tensors: a decay moves by at most about 5 % a step."""
    return torch.optim.Adam(tensors, lr=0.05)


@dataclass(frozen=True, kw_only=True)
class OuterReport:
    """What an outer step found.

    Attributes:
        outer_loss: Mean over processes.
        hypergradient_norm: ‖dL_V/dλ‖ with respect to the unconstrained tensors.
        inner_gradient_norm: Norm of the gradient of the inner loss with its penalties; the implicit formula is
            exact where it is 0.
        residual: Relative residual of the solve; NaN where unknown.
        iterations: Products with the curvature.
        curvature: Smallest Rayleigh quotient met.
        negative_curvature: Whether the solve stopped at negative curvature.
        identity_cosine: Cosine to the hypergradient of ``Identity()``; NaN unless asked for.
    """

    outer_loss: float
    hypergradient_norm: float
    inner_gradient_norm: float
    residual: float
    iterations: int
    curvature: float
    negative_curvature: bool
    identity_cosine: float

    def metrics(self) -> dict[str, float]:
        """Finite numbers by name, to log."""
        values = {key: float(value) for key, value in vars(self).items()}
        return {key: value for key, value in values.items() if math.isfinite(value)}


def _check_types(
    hyperparameters: object, optimizer: object, scheduler: object, solver: object, curvature: object
) -> None:
    def named(value: object) -> str:
        if isinstance(value, type):
            return f"the class {value.__name__}; write {value.__name__}(...)"
        return f"{type(value).__name__} {value!r}"[:200]

    if isinstance(hyperparameters, str) or not isinstance(hyperparameters, Iterable):
        raise TypeError(
            f"hyperparameters must be a list of Hyperparameter objects. Got {named(hyperparameters)}."
        )
    for hyperparameter in hyperparameters:
        if not isinstance(hyperparameter, Hyperparameter):
            raise TypeError(
                "hyperparameters must be Hyperparameter objects, such as WeightDecay(). "
                f"Got {named(hyperparameter)}."
            )
    kinds = (LinearOperator, FlatOperator)
    for name, value, kind, example in (
        ("solver", solver, InverseSolver, "Neumann()"),
        ("curvature", curvature, Curvature, "Hessian()"),
    ):
        if value is not None and (isinstance(value, type) or not isinstance(value, (kind, *kinds))):
            raise TypeError(
                f"{name} must be an object such as {example}, or any with `A @ v` on a flat vector. Got {named(value)}."
            )
    if not callable(optimizer) or not (scheduler is None or callable(scheduler)):
        wrong = scheduler if callable(optimizer) else optimizer
        raise TypeError(
            "optimizer and scheduler must be functions: from tensors to an optimizer, from that to a scheduler. "
            f"Got {named(wrong)}; write lambda tensors: torch.optim.Adam(tensors, lr=0.05)."
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
            "(torch.utils.checkpoint) is computed again with the present weights, or the inner loss writes into a "
            f"tensor. Got: {str(error).split('; expected')[0]}. Turn checkpointing off (and lower num_steps or "
            "truncate to save memory), or use Implicit()."
        ) from error


def _finite_mean(outer_loss: Tensor, reduce: Reduce | None) -> float:
    if outer_loss.numel() != 1:
        raise ValueError(
            f"The outer loss must be a scalar. Got shape {tuple(outer_loss.shape)}; take its mean."
        )
    value = outer_loss.detach().reshape(1).clone()
    mean = float(value if reduce is None else reduce(value))
    if not math.isfinite(mean):
        raise FloatingPointError(f"The outer loss must be finite. Got {mean}.")
    return mean


class _FixedDecay:
    """A decay that is not tuned: curvature without a mixed derivative."""

    def __init__(self, decay: Sequence[float]) -> None:
        self._decay = decay

    def curvature(self) -> LinearOperator:
        return DiagonalOperator(list(self._decay))

    def mixed(self, v: Vector) -> Vector:
        return ()


class OuterStep:
    """Hyperparameters, their optimizer and the solver's memory.

    ``compute`` finds the hypergradients at the current weights and holds them; ``apply`` moves the hyperparameters.
    Two calls, because the training loss's graph may still need the old values in between.
    A deep copy goes on by itself; to pickle one, ``optimizer`` and ``scheduler`` must be functions with a name.

    Args:
        hyperparameters: What is tuned; names must differ.
        optimizer: From the list of unconstrained tensors to a torch optimizer.
        scheduler: From that optimizer to a learning-rate scheduler, stepped once per outer step.
        solver: See :func:`implicit_hypergradient`.
        curvature: See :func:`implicit_hypergradient`.

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
        solver: InverseSolver | LinearOperator | FlatOperator | None = None,
        curvature: Curvature | LinearOperator | FlatOperator | None = None,
    ) -> None:
        _check_types(hyperparameters, optimizer, scheduler, solver, curvature)
        names = [h.name for h in hyperparameters]
        if not names:
            raise ValueError(
                "hyperparameters must hold at least one. Got none; give WeightDecay(), for example."
            )
        if len(set(names)) != len(names):
            raise ValueError(f"hyperparameters must have different names. Got {names}; set name=...")
        self.hyperparameters = tuple(hyperparameters)
        self.decays = tuple(h for h in hyperparameters if isinstance(h, WeightDecay))
        self.in_graph = tuple(h for h in hyperparameters if not isinstance(h, WeightDecay))
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        self.solver = solver if solver is not None else Neumann()
        self.curvature = curvature
        self.solver_state = SolverState()
        self.optimizer: Optimizer
        self.scheduler: LRScheduler | None = None
        self._pending: Vector | None = None
        self._inner: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = {}  # the parameters of `build`

    def build(self, parameters: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Create the tensors and the optimizer over all of them, or go on with those there are.

        A second call with the same parameters changes nothing. Where parameters were added (a layer was unfrozen) or
        taken away, what belongs to the ones that stay keeps its value and the optimizer's memory, the rest begins
        at its start, and the solver's state is dropped. Where none stays, or one has another shape, the
        parameters are those of another model: everything begins anew, as after :meth:`reset`.

        Args:
            parameters: Inner parameters by name.
            device: Where the tensors live.
        """
        inner = {name: (p.shape, p.dtype, p.device) for name, p in parameters.items()}
        shared = inner.keys() & self._inner.keys()
        if self._inner and (not shared or any(inner[name][0] != self._inner[name][0] for name in shared)):
            self.reset()
        if list(inner.items()) != list(self._inner.items()):  # of another space, if only by the order
            self.solver_state = SolverState()
        self._inner = inner
        earlier = self._located()
        for hyperparameter in self.hyperparameters:
            hyperparameter.build(parameters, device)
        self._build_optimizer(earlier)

    def _located(self) -> dict[tuple[str, str], tuple[Tensor, Names]]:
        """Each tensor and the names of its entries, by its hyperparameter and key."""
        return {(h.name, key): (t, h.entries()) for h in self.hyperparameters for key, t in h.tensors.items()}

    def _build_optimizer(self, earlier: Mapping[tuple[str, str], tuple[Tensor, Names]]) -> None:
        """Make an optimizer over the current tensors, with the memory of the one over the ``earlier`` tensors."""
        old, schedule = vars(self).get("optimizer"), self.scheduler
        if old is not None:
            held = [p for group in old.param_groups for p in group["params"]]
            if {id(p) for p in held} == {id(t) for t in self.tensors}:
                return
        self._pending = None
        self._start_optimizer()
        if old is None:
            return
        if self.scheduler is not None and schedule is not None:
            self.scheduler.load_state_dict(schedule.state_dict())
        origins = {
            tensor: (*earlier[where], names)
            for where, (tensor, names) in self._located().items()
            if where in earlier
        }
        carry_optimizer_(self.optimizer, old, origins)

    def _start_optimizer(self) -> None:
        optimizer = self._make_optimizer(list(self.tensors))
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "optimizer must be a function from tensors to a torch optimizer. "
                f"Got one that returns {type(optimizer).__name__}."
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "The outer optimizer must move by one gradient. Got LBFGS, which evaluates the loss again in each "
                "step; give torch.optim.Adam, for example."
            )
        scheduler = self._make_scheduler(optimizer) if self._make_scheduler is not None else None
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "The outer scheduler must step by itself. Got ReduceLROnPlateau, which waits for a metric; give "
                "ExponentialLR or CosineAnnealingLR, for example."
            )
        self.optimizer, self.scheduler = optimizer, scheduler

    def reset(self) -> None:
        """Forget all values, the optimizer and the solver's memory: the next :meth:`build` begins anew."""
        for hyperparameter in self.hyperparameters:
            hyperparameter.reset()
        vars(self).pop("optimizer", None)
        self.scheduler, self.solver_state, self._pending, self._inner = None, SolverState(), None, {}

    @property
    def tensors(self) -> Vector:
        """All unconstrained tensors: those in the loss's graph first, then the decays'."""
        return tuple(t for h in (*self.in_graph, *self.decays) for t in h.tensors.values())

    @property
    def in_graph_tensors(self) -> Vector:
        """Those unconstrained tensors that losses depend on through their graphs."""
        return tuple(t for h in self.in_graph for t in h.tensors.values())

    def values(self) -> dict[str, Tensor]:
        """Values in natural units: ``name``, or ``name/key`` where a hyperparameter has several tensors."""
        result = {}
        for hyperparameter in self.hyperparameters:
            values = hyperparameter.values()
            single = len(values) == 1
            for key, value in values.items():
                result[hyperparameter.name if single else f"{hyperparameter.name}/{key}"] = value
        return result

    def compute(
        self,
        inner_loss: Loss,
        outer_loss: Tensor,
        parameters: Mapping[str, Tensor],
        *,
        curvature: Curvature | LinearOperator | FlatOperator | None = None,
        fixed_decay: Sequence[float] = (),
        reduce: Reduce | None = None,
        inner_scale: float = 1.0,
        compare_identity: bool = False,
    ) -> OuterReport:
        """Find the hypergradients and hold them for :meth:`apply`.

        Args:
            inner_loss: Training loss without the weight decays, or a function that returns it.
            outer_loss: Validation loss with its graph, which is freed.
            parameters: Inner parameters by the names they had in :meth:`build`.
            curvature: In place of the one given at construction.
            fixed_decay: L2 penalty that the inner optimizer adds itself, one number per parameter.
            reduce: Averages a tensor over processes.
            inner_scale: Factor that ``inner_loss`` carries.
            compare_identity: Also compare with the hypergradient of ``Identity()``.

        Raises:
            ValueError: The outer loss is not a scalar.
            FloatingPointError: The outer loss or the solve is not finite. Nothing has changed then.
        """
        self._pending = None
        mean = _finite_mean(outer_loss, reduce)
        graph = self.in_graph_tensors
        penalties: list[Penalty] = [decay.linearize(parameters) for decay in self.decays]
        if any(fixed_decay):
            penalties.append(_FixedDecay(fixed_decay))
        result = implicit_result(
            inner_loss,
            outer_loss,
            tuple(parameters.values()),
            graph,
            solver=self.solver,
            curvature=curvature if curvature is not None else self.curvature,
            penalties=penalties,
            state=self.solver_state,
            reduce=reduce,
            inner_scale=inner_scale,
            allow_unused=True,
            compare_identity=compare_identity,
        )
        hypergradient = (*result.hypergradient, *(t for group in result.penalties for t in group))
        size = float(norm(hypergradient))
        if not math.isfinite(size):
            raise FloatingPointError(f"The hypergradient must be finite. Got norm {size}.")
        self._pending, self.solver_state = hypergradient, result.solution.state
        weights = tuple(p.detach() for p in parameters.values())
        inner = result.inner_gradient
        for penalty in penalties:
            inner = tuple(g + d for g, d in zip(inner, penalty.curvature() @ weights, strict=True))
        return OuterReport(
            outer_loss=mean,
            hypergradient_norm=size,
            inner_gradient_norm=float(dot(inner, inner)) ** 0.5,
            residual=result.solution.residual,
            iterations=result.solution.iterations,
            curvature=result.solution.curvature,
            negative_curvature=result.solution.status == "negative_curvature",
            identity_cosine=result.identity_cosine,
        )

    def compute_unrolled(
        self, outer_loss: Tensor, *, reduce: Reduce | None = None, inner_gradient_norm: float = math.nan
    ) -> OuterReport:
        """Find the hypergradients by differentiating ``outer_loss`` itself, and hold them for :meth:`apply`.

        Args:
            outer_loss: Scalar whose graph leads back through training steps to the hyperparameters; it is freed.
            reduce: Averages a tensor over processes.
            inner_gradient_norm: For the report.

        Raises:
            ValueError: The outer loss is not a scalar, or its graph reaches no hyperparameter.
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
        return self.hold(found, mean, reduce=reduce, inner_gradient_norm=inner_gradient_norm)

    def hold(
        self,
        gradients: Sequence[Tensor | None],
        outer_loss: float,
        *,
        reduce: Reduce | None = None,
        inner_gradient_norm: float = math.nan,
    ) -> OuterReport:
        """Take hypergradients that were found elsewhere, one per tensor of :attr:`tensors`, for :meth:`apply`.

        Args:
            gradients: Gradients of this process; None where the outer loss does not depend.
            outer_loss: For the report; the mean over processes.
            reduce: Averages a tensor over processes.
            inner_gradient_norm: For the report.

        Raises:
            FloatingPointError: A hypergradient is not finite. Nothing has changed then.
        """
        self._pending = None
        local = tuple(
            torch.zeros_like(t) if g is None else g for t, g in zip(self.tensors, gradients, strict=True)
        )
        hypergradient = average(local, reduce)
        size = float(norm(hypergradient))
        if not math.isfinite(size):
            raise FloatingPointError(f"The hypergradient must be finite. Got norm {size}.")
        self._pending = hypergradient
        return OuterReport(
            outer_loss=outer_loss,
            hypergradient_norm=size,
            inner_gradient_norm=inner_gradient_norm,
            residual=math.nan,
            iterations=0,
            curvature=math.nan,
            negative_curvature=False,
            identity_cosine=math.nan,
        )

    @property
    def pending(self) -> bool:
        """Whether hypergradients are held that :meth:`apply` has not used."""
        return self._pending is not None

    def apply(self) -> None:
        """Move the hyperparameters along the held hypergradients, then into their transforms' ranges."""
        if self._pending is None:
            return
        for tensor, gradient in zip(self.tensors, self._pending, strict=True):
            tensor.grad = gradient.to(tensor.dtype)
        self.optimizer.step()
        self.clear_gradients()
        if self.scheduler is not None:
            self.scheduler.step()
        for hyperparameter in self.hyperparameters:
            hyperparameter.project_()
        self._pending = None

    def discard(self) -> None:
        """Drop the held hypergradients."""
        self._pending = None

    def clear_gradients(self) -> None:
        """Drop what a backward pass of the training loss left on the hyperparameters."""
        for tensor in self.tensors:
            tensor.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next outer step depends on; loads with ``weights_only=True``."""
        return {
            "hyperparameters": {h.name: h.state_dict() for h in self.hyperparameters},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "solver": self.solver_state.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Restore; :meth:`build` must have run.

        Raises:
            ValueError: The state belongs to other hyperparameters.
        """
        saved = state["hyperparameters"]
        if set(saved) != {h.name for h in self.hyperparameters}:
            raise ValueError(
                f"The saved hyperparameters must be {[h.name for h in self.hyperparameters]}. Got {sorted(saved)}: the "
                "checkpoint was written with others."
            )
        for hyperparameter in self.hyperparameters:
            hyperparameter.load_state_dict(saved[hyperparameter.name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.solver_state.load_state_dict(state["solver"], tuple(parameters.values()))

    def __getstate__(self) -> dict[str, Any]:
        # Copies of hyperparameters have tensors of their own, which a copied optimizer would not know.
        state = dict(self.__dict__)
        if "optimizer" in state:
            state["optimizer"] = self.optimizer.state_dict()
            state["scheduler"] = self.scheduler.state_dict() if self.scheduler is not None else None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizer, scheduler = state.get("optimizer"), state["scheduler"]
        self.__dict__.update({key: value for key, value in state.items() if key != "optimizer"})
        if optimizer is None:
            return
        self._start_optimizer()
        self.optimizer.load_state_dict(optimizer)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(scheduler)
