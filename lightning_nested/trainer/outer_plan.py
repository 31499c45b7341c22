"""The plan of a run: when outer steps are made, where the outer loss is differentiated, and what the decays mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler

from lightning_nested.arguments import positive
from lightning_nested.hypergradient import Curvature, FiniteDifference
from lightning_nested.hypergradient.evaluation_point import EvaluationPoint, LookAhead
from lightning_nested.hyperparameters import OuterStep
from lightning_nested.hyperparameters.shared_adam import set_batches
from lightning_nested.linalg.solvers.base import InverseSolver
from lightning_nested.linalg.solvers.given import AnySolver
from lightning_nested.linalg.vectors import Vector
from lightning_nested.optim.step_dynamics import decay_factors, decoupled_rates
from lightning_nested.trainer.forecast import WATCHED_STEPS, Forecast
from lightning_nested.trainer.inner_graph import InnerGraph
from lightning_nested.trainer.lightning import reduction
from lightning_nested.trainer.outer_costs import batches_in_round, begin_train_batches, outer_step_cost
from lightning_nested.trainer.outer_defaults import (
    needs_few_steps,
    only_options,
    planned_optimizer,
    point_and_solver,
    warmup_share,
)
from lightning_nested.trainer.outer_loop import OuterLoop
from lightning_nested.trainer.own_decay import OwnDecay
from lightning_nested.trainer.pace import Pace, plan
from lightning_nested.trainer.run_units import measured_units, peak_rates
from lightning_nested.trainer.shards import shards_parameters

# Inner steps after which the optimizer's second moments say how large its steps will be.
_SETTLED = 10


class OuterPlan:
    """Pace, forecast and decays of one run after another.

    Args:
        outer: Hyperparameters and their optimizer.
        point: Where the outer loss is differentiated; None: see :func:`point_and_solver`.
        solver: The user's solver; None: see :func:`point_and_solver`.
        overhead: Share of the training's own gradients that outer steps may cost.
        every_n_steps: Given by the user; None: by the budget.
        warmup_steps: Given by the user; None: a tenth of the run.
        default_optimizer: Whether the outer optimizer and its schedule are this class's to choose.

    Attributes:
        pace: Plan of the current run.
        forecast: Statistics of the current run; None where nothing needs them.
        own_decay: Weight decay of a decoupled optimizer, which ours replace.
    """

    def __init__(
        self,
        outer: OuterStep,
        *,
        point: EvaluationPoint | None,
        solver: AnySolver,
        overhead: float = 1.0,
        every_n_steps: int | None = None,
        warmup_steps: int | None = None,
        default_optimizer: bool = False,
    ) -> None:
        positive(overhead=overhead)
        self.outer, self.overhead = outer, overhead
        self._given = point, solver
        self.point, self.solver = point_and_solver(outer, point, solver)
        self.every_n_steps, self.warmup_steps = every_n_steps, warmup_steps
        self.pace: Pace | None = None
        self.forecast: Forecast | None = None
        self._ahead = 0  # inner steps up to the next outer one
        self.accumulate: int | None = None  # batches of an inner step; None: the Trainer accumulates them
        self._default_optimizer = default_optimizer
        self._optimizer: Optimizer | None = None
        self._parameters: tuple[nn.Parameter, ...] = ()
        self.own_decay = OwnDecay()
        self._kept: Mapping[str, Any] | None = None  # a forecast's state, until there are its parameters
        self.units: dict[str, float] = {}  # see WeightDecay.fit_to_run
        self._units_steps: int | None = None  # inner steps of the run that they are of
        self._fitted = False  # whether the decays have started from them
        self._schedulers: list[LRScheduler] = []
        self._first_rates: list[float] = []  # of the groups, before the first step

    # ---- a run

    def schedule(self, trainer: Trainer, loop: OuterLoop, *, accumulate: int | None = None) -> None:
        """Plan the run; called before the hyperparameters are built.

        Args:
            trainer: Trainer of the run.
            loop: Outer loop that follows the plan.
            accumulate: Batches of an inner step; None: as many as the Trainer accumulates.
        """
        self.accumulate, in_shards = accumulate, shards_parameters(trainer)
        self.point, self.solver = point_and_solver(self.outer, *self._given, in_shards=in_shards)
        begin_train_batches(self, trainer, loop, self._batches(trainer))
        self.pace = pace = plan(
            trainer,
            accumulate=accumulate,
            cost=outer_step_cost(self, trainer, loop, self._batches(trainer)),
            overhead=self.overhead,
            every_n_steps=self.every_n_steps,
            warmup_steps=self.warmup_steps,
            warmup_share=warmup_share(self.outer),
            limited=needs_few_steps(self.outer, loop.train_batches.count),
            late=only_options(self.outer),
            outer_batches=batches_in_round(trainer, loop),
            began=(loop.inner_steps, trainer.global_step),
        )
        self._schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._rescale_units()
        _lead(loop, pace)
        if self._default_optimizer:
            steps = None if only_options(self.outer) else pace.outer_steps
            # Functions with names: a strategy may pickle them.
            self.outer.set_optimizer(
                planned_optimizer(self.outer, pace.rate),
                partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=steps) if steps else None,
            )

    def _batches(self, trainer: Trainer) -> int:
        return int(trainer.accumulate_grad_batches if self.accumulate is None else self.accumulate)

    def attach(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
        """Begin the statistics of these parameters."""
        self._detach()
        self._optimizer, self._parameters = optimizer, tuple(parameters.values())
        self._first_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.bound_decays(restart=False)
        set_batches(self.outer.optimizer, None if self.pace is None else self.pace.outer_batches)
        if self.reads_run:
            point = self.point if isinstance(self.point, LookAhead) else None
            self.forecast = Forecast(module, parameters, optimizer, self.outer.decays, point=point)
        if self.forecast is not None and self.forecast.is_of(self._kept):
            self.forecast.load_state_dict(self._kept)  # type: ignore[arg-type]
            self._kept = None
        self.take_decays()

    def take_decays(self) -> None:
        """Take the place of a decoupled optimizer's own decay; again once a checkpoint has restored it."""
        if self._optimizer is not None and self.outer.decays:
            self.own_decay.take(self._optimizer)

    def stop(self) -> None:
        """Remove hooks, and give the optimizer its own decay back; a second fit goes on from the statistics."""
        if self.forecast is not None:
            self._kept = self.forecast.state_dict()
        self._detach()

    def reset(self) -> None:
        """Forget the statistics, for another module."""
        self._kept, self.units, self._units_steps, self._fitted = None, {}, None, False

    def _detach(self) -> None:
        if self.forecast is not None:
            self.forecast.stop()
            self.forecast = None
        self.own_decay.give_back()
        self._optimizer, self._parameters = None, ()

    # ---- an inner step

    def foresee(self, due: Callable[[int], bool], step: int) -> None:
        """Find how far the next outer step is from ``step``, and what the forecast watches until then."""
        if self.forecast is not None:
            # Many, where it is too far to matter.
            self.watch(next((k for k in range(1, WATCHED_STEPS + 1) if due(step + k)), 10**9))

    def watch(self, ahead: int) -> None:
        """Watch the coming inner step, ``ahead`` steps before an outer one."""
        if self.forecast is not None:
            self._ahead = ahead
            self.forecast.watch(ahead)

    def observe_gradient(self, trainer: Trainer, *, scale: float, hook_scale: float) -> None:
        """Give the forecast the gradients of this inner step; see :meth:`Forecast.gradient`."""
        if self.forecast is not None and self.forecast.averages(self._ahead):
            self.forecast.gradient(
                self._ahead,
                scale=scale,
                hook_scale=hook_scale,
                reduce=reduction(trainer),
                batches=self._batches(trainer),
                processes=trainer.world_size,
            )

    def add_decays(self, parameters: Mapping[str, Tensor], scale: float) -> None:
        """Apply the tuned decays as the optimizer would its own; ``scale`` is the factor on the gradients."""
        assert self._optimizer is not None
        rates = decoupled_rates(self._optimizer) if self.decoupled else {}
        for decay in self.outer.decays:
            if rates:
                decay.shrink_(parameters, rates)
            decay.add_gradient_(parameters, scale, decoupled=rates)

    @property
    def decoupled(self) -> bool:
        """True if the tuned decays take the place of a decoupled optimizer's own."""
        return self.own_decay.taken

    def fit_decays(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Start the decays from the length of the run: after 10 inner steps, or the warm-up if that is shorter."""
        pace, optimizer = self.pace, self._optimizer
        if self._fitted or pace is None or pace.total_steps is None or optimizer is None:
            return
        # A rate of zero says nothing of the steps to come.
        stands = not all(float(group["lr"]) > 0 for group in optimizer.param_groups)
        if stands or step < max(1, min(_SETTLED, pace.warmup_steps)):
            return
        peaks = peak_rates(optimizer, self._schedulers, self._first_rates, pace.total_steps)
        self.units = measured_units(optimizer, parameters, pace.total_steps, peaks)
        self._units_steps, self._fitted = pace.total_steps, True
        self.bound_decays(restart=True)

    def _rescale_units(self) -> None:
        """Take units of a run of another length for those of this one."""
        total = None if self.pace is None else self.pace.total_steps
        if total is not None and self._units_steps not in (None, total):
            self.units = {name: unit * self._units_steps / total for name, unit in self.units.items()}
            self._units_steps = total

    def bound_decays(self, *, restart: bool) -> None:
        """Bound the decays by the units of the run."""
        if self.pace is None or self.pace.total_steps is None or not self.units:
            return
        for decay in self.outer.decays:
            if decay.init is None and any(name in self.units for name in decay.parameter_names):
                steps, passes = self.pace.total_steps, self.pace.passes
                decay.fit_to_run(self.units, steps, passes=passes, restart=restart)
                if restart:
                    self.outer.remember_first(decay)

    # ---- an outer step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep backward passes that are not the training's own out of the statistics."""
        self.pause(True)
        try:
            yield
        finally:
            self.pause(False)

    def pause(self, paused: bool, batch: Any = None) -> None:
        """Observe the training on ``batch``, or stop that for a while."""
        if self.forecast is not None:
            self.forecast.fisher.pause(paused, batch)

    def look(self, trainer: Trainer, graph: InnerGraph, scale: float) -> Vector:
        """Return the weights at which the outer loss is differentiated, one tensor per inner parameter."""
        if self.forecast is None or self.pace is None:
            return self._current
        total = self.pace.total_steps
        self.forecast.remaining = math.inf if total is None else float(max(1, total - trainer.global_step))
        self.forecast.count()
        if not self.looks_ahead:
            return self._current
        loss = float(torch.stack([loss.detach() for loss in graph.losses]).sum()) / scale
        return self.forecast.weights(loss, _evaluation(graph.again(), scale), reduction(trainer))

    @property
    def looks_ahead(self) -> bool:
        """True if outer steps evaluate the training loss elsewhere."""
        return isinstance(self.point, LookAhead)

    @property
    def reads_run(self) -> bool:
        """True if outer steps need statistics of the training."""
        return self.looks_ahead or self.solver.needs_statistics

    @property
    def _current(self) -> Vector:
        return tuple(p.detach() for p in self._parameters)

    def bound_solver(self) -> InverseSolver:
        """Return the solver for this outer step."""
        return self.solver if self.forecast is None else self.solver.bind(self.forecast)

    def decay_factors(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the factors that make coupled decays of decoupled ones, by name."""
        if self._optimizer is None or not self.outer.decays:
            return {}
        if self.forecast is not None:
            return self.forecast.decay_factors()
        return decay_factors(self._optimizer, parameters)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next outer step depends on."""
        return {
            "units": dict(self.units),
            "units_steps": self._units_steps,
            "fitted": self._fitted,
            "began": None if self.pace is None else self.pace.began,
            "forecast": self._kept if self.forecast is None else self.forecast.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; :meth:`attach` must have run."""
        self.units, self._units_steps = dict(state["units"]), state.get("units_steps")
        self._fitted = state.get("fitted", bool(self.units))
        if self.pace is not None:
            # Its schedule began with that run, not with this one.
            first, made = state.get("began") or (0, 0)
            self.pace = self.pace.begun_at((first, made))
        self._rescale_units()
        self.bound_decays(restart=False)
        self._kept = state["forecast"]
        if self.forecast is not None and self.forecast.is_of(self._kept):
            self.forecast.load_state_dict(state["forecast"])
            self._kept = None

    def continue_schedule(self, loop: OuterLoop) -> None:
        """Let the default schedule of a restored outer optimizer end with this run: it may be longer than the saved."""
        if self.pace is not None:
            _lead(loop, self.pace)
        schedule = self.outer.scheduler
        set_batches(self.outer.optimizer, None if self.pace is None else self.pace.outer_batches)
        if self._default_optimizer and isinstance(schedule, LinearLR) and self.pace is not None:
            _end_with(schedule, self.pace)


def _lead(loop: OuterLoop, pace: Pace) -> None:
    """Let a loop make its outer steps where the plan has them."""
    loop.every_n_steps, loop.warmup_steps = pace.every_n_steps, pace.warmup_steps
    loop.last_restart = pace.last_restart(loop.restart_every)


def _evaluation(repeat: Callable[[], Tensor] | None, scale: float) -> Callable[[], float]:
    """Return a function that evaluates a loss again; NaN for one that cannot be: the trust radius stays as it is."""
    return lambda: math.nan if repeat is None else _value(repeat) / scale


def needs_graph(plan: OuterPlan, curvature: Curvature | None) -> bool:
    """Return True if outer steps differentiate the training loss's gradient: its graph is kept for them."""
    second = bool(plan.outer.in_graph) or plan.solver.needs_operator
    return second and not isinstance(curvature, FiniteDifference)


def _value(evaluate: Callable[[], Tensor]) -> float:
    """Return a loss without its graph, unless its evaluation differentiates, as a gradient penalty does."""
    try:
        with torch.no_grad():
            return float(evaluate())
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    return float(evaluate().detach())


def _end_with(schedule: LinearLR, pace: Pace) -> None:
    """Let a schedule go from the first rate of a plan to zero at its end, from where it is now."""
    steps, rate = pace.outer_steps, pace.rate
    if not steps or schedule.total_iters == steps:
        return
    schedule.total_iters = steps
    schedule.base_lrs = [rate] * len(schedule.base_lrs)
    for group in schedule.optimizer.param_groups:
        group["initial_lr"], group["lr"] = rate, rate * max(0.0, 1 - schedule.last_epoch / steps)
