"""Counters, logging, restarts and checkpoints of outer steps, for every class that runs them."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nested.arguments import at_least
from lightning_nested.hyperparameters import OuterReport, OuterStep
from lightning_nested.hyperparameters.outer_report import Spread, ValueTrace, mean_of, spread, summary_line
from lightning_nested.linalg.saved import require_keys
from lightning_nested.optim.step_dynamics import shaped
from lightning_nested.trainer.lightning import logger_step, show_in_progress_bar
from lightning_nested.trainer.outer_batches import OuterBatches, end_workers
from lightning_nested.trainer.outer_loss import evaluate_outer
from lightning_nested.trainer.random_stream import base_seed
from lightning_nested.trainer.restart import reinitialize
from lightning_nested.trainer.self_check import SelfCheck
from lightning_nested.trainer.training_batches import TrainingBatches

_COUNTERS = ("inner_steps", "outer_steps", "skipped_steps", "skipped_in_a_row")
_OPTIONS = ("restart_every", "max_skipped", "log_every_n_outer_steps")


class OuterLoop:
    """Everything about outer steps but the hypergradient itself, which the owner finds.

    Args:
        owner: Class name in warnings.
        outer: Hyperparameters and their optimizer.
        **options: See :class:`HypergradientCallback`.

    Attributes:
        check: Checks of the first outer step of a fit.
        inner_steps: Inner steps made so far.
        outer_steps: Outer steps made so far.
        skipped_steps: Outer steps left out because a value was not finite.
        last_report: Report of the last hypergradient.
        parameters: Inner parameters by name.
        initial: Values that restarts begin with, by name.
        batches: Batches of the outer loss, during training.
        trace: Values over the run, at the outer steps that are logged.
        train_batches: Further training batches for the mixed derivative.

    Raises:
        ValueError: A count is too small.
    """

    def __init__(
        self,
        owner: str,
        outer: OuterStep,
        *,
        every_n_steps: int = 1,
        warmup_steps: int = 0,
        restart_every: int | None = None,
        max_skipped: int = 10,
        log_every_n_outer_steps: int = 10,
        self_check: bool = True,
        train_batches: int | None = 0,
    ) -> None:
        self.every_n_steps, self.warmup_steps, self.restart_every = every_n_steps, warmup_steps, restart_every
        self.last_restart = math.inf  # inner step after which the run is too short to train again
        self.max_skipped, self.log_every_n_outer_steps = max_skipped, log_every_n_outer_steps
        at_least(1, every_n_steps=every_n_steps, restart_every=restart_every)
        at_least(0, warmup_steps=warmup_steps, max_skipped=max_skipped)
        at_least(0, log_every_n_outer_steps=log_every_n_outer_steps)
        self.owner, self.outer = owner, outer
        self.check = SelfCheck(owner, enabled=self_check)
        self._began, self._last_error = (0, 0), ""  # inner and outer steps at the start of fit
        self.inner_steps = self.outer_steps = self.skipped_steps = self.skipped_in_a_row = 0
        self.last_report: OuterReport | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.initial: dict[str, Tensor] = {}
        self.batches: OuterBatches | None = None
        self.trace = ValueTrace()
        self.train_batches = TrainingBatches(train_batches)
        # Positions in the outer data: at the end of training, and from a checkpoint until start.
        self._position: Mapping[str, int] = {}
        self._saved_position: Mapping[str, int] = {}

    def is_due(self, inner_step: int) -> bool:
        """Return True if there is an outer step at this inner step, counted from 0."""
        since = inner_step - self.warmup_steps
        return since >= 0 and since % self.every_n_steps == 0

    def needs_step(self, trainer: Trainer) -> bool:
        """Return True in a ``fast_dev_run``, which is to try every part, as long as it had no outer step."""
        return bool(trainer.fast_dev_run) and self.outer_steps == self._began[1]  # type: ignore[attr-defined]

    def is_last_chance(self, trainer: Trainer) -> bool:
        """Return True in the last inner step of a ``fast_dev_run`` if it had no outer step."""
        if not self.needs_step(trainer):
            return False
        size, last = trainer.accumulate_grad_batches, trainer.num_training_batches - 1
        return bool(trainer.is_last_batch or trainer.fit_loop.batch_idx // size == last // size)

    def logs(self, outer_step: int) -> bool:
        """Return True if this outer step, counted from 1, is logged."""
        every = self.log_every_n_outer_steps
        return every > 0 and (outer_step - 1) % every == 0

    # ---- one fit

    def prepare(self, options: object = None) -> None:
        """End a stream left by a ``fit`` that failed; read the owner's ``options`` again, for they may be replaced."""
        self.stop()
        for name in _OPTIONS:
            setattr(self, name, getattr(options, name, getattr(self, name)))

    def build(self, parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
        """Take the inner parameters, and build the hyperparameters for them; values that are there stay."""
        # A checkpoint's values of parameters that are still frozen stay.
        added = {n: p for n, p in parameters.items() if n not in self.parameters and n not in self.initial}
        self.parameters = dict(parameters)
        self.outer.build(self.parameters, device)
        self.remember_initial(added)

    def remember_initial(self, parameters: Mapping[str, Tensor]) -> None:
        """Keep values for restarts, if there are any."""
        if self.restart_every is not None:
            self.initial.update({name: p.detach().clone() for name, p in parameters.items()})

    def is_built_for(self, optimizer: Optimizer) -> bool:
        """Return False if a finetuning callback froze or unfroze parameters of the inner optimizer.

        Also after loading a state of other parameters: layers are unfrozen only after it has been restored.
        """
        held = shaped(optimizer)
        same = len(held) == len(self.parameters) and all(map(operator.is_, held, self.parameters.values()))
        return same and self.outer.is_built_for(self.parameters)

    def reset(self) -> None:
        """Forget values, counters and parameters, for another module."""
        self.outer.reset()
        self.parameters, self.initial, self.last_report = {}, {}, None
        self._position = self._saved_position = {}
        self.trace = ValueTrace()
        self.train_batches.reset()
        self.inner_steps = self.outer_steps = self.skipped_steps = self.skipped_in_a_row = 0

    def start(self, trainer: Trainer, loader: Any) -> OuterBatches:
        """Begin the stream of outer batches, at the position of the checkpoint if there is one."""
        self.stop()
        self.check.begin()
        self._last_error = ""
        self.batches = OuterBatches(trainer, loader, seed=base_seed(trainer))
        self._go_on()
        return self.batches

    def _go_on(self) -> None:
        """Count from here, and take the batches from the checkpoint's position on."""
        self._began = self.inner_steps, self.outer_steps
        if self.batches is not None and self._saved_position:
            self.batches.load_state_dict(self._saved_position)
            self._saved_position = {}

    def stop(self) -> None:
        """End the streams of batches and their worker processes."""
        self.train_batches.stop()
        if self.batches is not None:
            self._position = self.batches.state_dict()
            end_workers(self.batches)
            self.batches = None

    def conclude(self, every: str = "every_n_steps", steps: int | None = None) -> None:
        """Warn at the end of training if there was no outer step, and say why; or a hypergradient was always zero.

        Args:
            every: Name of the option that says how many inner steps there are for an outer one.
            steps: Its value; None: ``every_n_steps``.
        """
        inner, steps = self.inner_steps - self._began[0], steps or self.every_n_steps
        if self.outer_steps > self._began[1]:
            self.check.conclude_fit(self.outer)
        elif inner and self._last_error:
            rank_zero_warn(
                f"{self.owner} skipped the outer step every time, in {inner} inner steps, and tuned nothing. Got at "
                f"last: {self._last_error}"
            )
        elif inner:
            if self.warmup_steps >= self.inner_steps:
                why = f"the warm-up is longer; lower warmup_steps={self.warmup_steps}"
            elif steps > self.inner_steps - self.warmup_steps:
                why = f"an outer step takes more of them; lower {every}={steps}"
            else:
                why = "should_update returned False at all of them"
            rank_zero_warn(
                f"{self.owner} made no outer step in {inner} inner steps, and tuned nothing: {why}."
            )

    # ---- one outer step

    def probe(self, trainer: Trainer, module: LightningModule, loss: Callable[[Any], Tensor]) -> None:
        """Evaluate the outer loss once in a fit, long before it is needed, so that its faults show at once."""
        if self.check.takes_probe():
            assert self.batches is not None
            found = evaluate_outer(trainer, module, self.batches.look_ahead(), loss)
            self.check.probe(found, self.parameters)

    def keep(self, report: OuterReport) -> None:
        """Record that a hypergradient was found."""
        self.last_report, self.skipped_in_a_row = report, 0
        self.outer.trend.add(report.outer_loss)
        self.check.negative(report)

    def skip(self, error: FloatingPointError) -> None:
        """Record that none was found.

        Raises:
            FloatingPointError: More than ``max_skipped`` successive outer steps failed.
        """
        self._last_error = str(error)
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.max_skipped:
            raise FloatingPointError(
                f"More than max_skipped={self.max_skipped} successive outer steps failed. Got at last: {error}"
            ) from error
        if self.skipped_in_a_row == 1:
            rank_zero_warn(f"{self.owner} skipped the outer step at inner step {self.inner_steps}: {error}")

    def step(self, module: LightningModule) -> bool:
        """Move the hyperparameters along the held hypergradient; log and restart where that is due.

        Returns:
            Whether the weights were restarted.
        """
        self.outer.apply()
        self.outer_steps += 1
        self.check.conclude_step(module, self.outer)
        if self.logs(self.outer_steps) and self.last_report is not None:
            self._log(module, self.last_report)
            self.trace.add(self.outer_steps, self.last_report.outer_loss, self.spreads())
        if self.restart_every is not None and self.outer_steps % self.restart_every == 0:
            if self.inner_steps > self.last_restart:
                rank_zero_info(
                    f"{self.owner} makes no restart after outer step {self.outer_steps}: less than "
                    f"restart_every={self.restart_every} of them are left, and the run would end with an untrained "
                    "network."
                )
                return False
            assert self.batches is not None
            seed = self.batches.seed + 104_729 * self.outer_steps
            reinitialize(module, self.initial, self.parameters, seed)
            for optimizer in module.trainer.optimizers:
                optimizer.state.clear()
            return True
        return False

    def _log(self, module: LightningModule, report: OuterReport) -> None:
        """Log an outer step. To log another number, add it to ``metrics`` here, or as a field to ``OuterReport``.

        Loggers get it here, once, at the step that it belongs to: ``self.log(..., on_step=True)`` would repeat the
        last value at every later step, and drop those that fall between two of the Trainer's ``log_every_n_steps``.
        ``log_dict`` gives it to checkpoints and early stopping. The progress bar gets the outer loss, and the mean of
        the first hyperparameter.
        """
        step = logger_step(module.trainer)
        metrics = {f"hypergradient/{key}": value for key, value in report.metrics().items()}
        metrics["hypergradient/skipped_steps"] = float(self.skipped_steps)
        for name, value in self.outer.values().items():
            if value.numel() == 1:
                metrics[f"hyperparameters/{name}"] = float(value)
                continue
            metrics[f"hyperparameters/{name}/mean"] = float(value.mean())
            for logger in module.trainer.loggers:
                add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
                if add_histogram is not None:
                    add_histogram(f"hyperparameters/{name}", value.float().cpu(), step)
        for logger in module.trainer.loggers:
            logger.log_metrics(metrics, step)
        module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1, logger=False)
        first = self.outer.hyperparameters[0]
        values = first.values()
        label = first.name if sum(v.numel() for v in values.values()) == 1 else f"{first.name}/mean"
        shown = {"outer_loss": report.outer_loss, label: mean_of(values)}
        show_in_progress_bar(module.trainer, shown)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next outer step depends on but ``initial``, which the owner adds."""
        position = self.batches.state_dict() if self.batches else self._saved_position or self._position
        counters = {name: getattr(self, name) for name in _COUNTERS}
        held: dict[str, Any] = {"batches": dict(position), "trace": copy.deepcopy(vars(self.trace))}
        if further := self.train_batches.state_dict():
            held["train_batches"] = further
        return {"outer": self.outer.state_dict(), **held, **counters}

    def load_state_dict(
        self, state: Mapping[str, Any], *, keys: Sequence[str] = (), convert: bool = True
    ) -> None:
        """Restore; the hyperparameters must have been built. See :meth:`OuterStep.load_state_dict`.

        Raises:
            ValueError: A key lacks, those that the owner reads by itself (``keys``) included, or the hyperparameters
                are others.
        """
        require_keys(state, ("outer", "batches", *_COUNTERS, *keys), self.owner)
        for message in self.outer.load_state_dict(state["outer"], self.parameters, convert=convert):
            rank_zero_warn(f"{self.owner}: {message}")
        for name in _COUNTERS:
            setattr(self, name, state[name])
        for name, value in state.get("initial", {}).items():
            self.initial[name] = value.to(next(iter(self.parameters.values())).device)
        if self.restart_every is not None and not state.get("initial"):
            rank_zero_warn(
                f"{self.owner}: the saved run had no restart_every, and so no initial weights. Parameters that no "
                "reset_parameters reaches restart from those of the checkpoint."
            )
        # Checkpoints of earlier versions have none.
        self.trace = ValueTrace(**copy.deepcopy(dict(state.get("trace", {}))))
        self._saved_position = state["batches"] or {}
        # Earlier versions had none.
        self.train_batches.load_state_dict(state.get("train_batches", {}))
        self._go_on()

    def spreads(self) -> dict[str, Spread]:
        """Return mean, smallest and largest value, and the number of values, of each hyperparameter."""
        return {h.name: spread(h.values()) for h in self.outer.hyperparameters if h.built}

    def summary(self) -> str:
        """Describe what was tuned, a line for each hyperparameter, and whether the outer loss became lower."""
        lines = [
            summary_line(name, self.outer.first[name], last)
            for name, last in self.spreads().items()
            if name in self.outer.first
        ]
        steps = (
            "1 outer step, too few to judge by"
            if self.outer_steps == 1
            else f"{self.outer_steps} outer steps"
        )
        title = f"{self.owner} tuned in {steps}:"
        return "\n  ".join([title, *lines, *self.trend_lines(), *self._advice()])

    def _advice(self) -> list[str]:
        """Return what the values say of the next run, a line for each hyperparameter that has something to say."""
        spreads, first = self.spreads(), self.outer.first
        known = [h for h in self.outer.hyperparameters if h.name in spreads and h.name in first]
        return [line for h in known if (line := h.advice(first[h.name][0], spreads[h.name][0]))]

    def trend_lines(self) -> list[str]:
        """Compare the first outer losses with the last in a line, which says so if no value has changed."""
        moved = any(last != self.outer.first.get(name) for name, last in self.spreads().items())
        return self.outer.trend.lines(moved=moved)
