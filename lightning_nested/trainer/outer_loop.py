"""Counters, logging, restarts and checkpoints of outer steps, for every class that runs them."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nested.arguments import at_least
from lightning_nested.files import replace_text
from lightning_nested.hyperparameters import OuterReport, OuterStep
from lightning_nested.hyperparameters.constructed import Constructed
from lightning_nested.hyperparameters.outer_report import spread, summary_line
from lightning_nested.hyperparameters.saved_values import saved_values
from lightning_nested.linalg.saved import require_keys
from lightning_nested.optim.step_dynamics import trainable
from lightning_nested.trainer.lightning import logger_step
from lightning_nested.trainer.outer_batches import OuterBatches, end_workers
from lightning_nested.trainer.outer_loss import evaluate_outer
from lightning_nested.trainer.random_stream import RandomStream, base_seed
from lightning_nested.trainer.self_check import SelfCheck
from lightning_nested.trainer.use import OneFitCallback

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
    ) -> None:
        self.every_n_steps, self.warmup_steps, self.restart_every = every_n_steps, warmup_steps, restart_every
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
        self._steps_before = 0  # outer steps before this fit
        # Positions in the outer data: at the end of training, and from a checkpoint until start.
        self._position: Mapping[str, int] = {}
        self._saved_position: Mapping[str, int] = {}

    def is_due(self, inner_step: int) -> bool:
        """Return True if there is an outer step at this inner step, counted from 0."""
        since = inner_step - self.warmup_steps
        return since >= 0 and since % self.every_n_steps == 0

    def needs_step(self, trainer: Trainer) -> bool:
        """Return True in a ``fast_dev_run``, which is to try every part, as long as it had no outer step."""
        return bool(trainer.fast_dev_run) and self.outer_steps == self._steps_before  # type: ignore[attr-defined]

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
        held = trainable(optimizer)
        same = len(held) == len(self.parameters) and all(map(operator.is_, held, self.parameters.values()))
        return same and self.outer.is_built_for(self.parameters)

    def reset(self) -> None:
        """Forget values, counters and parameters, for another module."""
        self.outer.reset()
        self.parameters, self.initial, self.last_report = {}, {}, None
        self._position = self._saved_position = {}
        self.inner_steps = self.outer_steps = self.skipped_steps = self.skipped_in_a_row = 0

    def start(self, trainer: Trainer, loader: Any) -> OuterBatches:
        """Begin the stream of outer batches, at the position of the checkpoint if there is one."""
        self.stop()
        self.check.begin()
        self._began, self._last_error = (self.inner_steps, self.outer_steps), ""
        self.batches = OuterBatches(trainer, loader, seed=base_seed(trainer))
        self._steps_before = self.outer_steps
        if self._saved_position:
            self.batches.load_state_dict(self._saved_position)
            self._saved_position = {}
        return self.batches

    def stop(self) -> None:
        """End the stream of outer batches and its worker processes."""
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

    def step(self, module: LightningModule) -> None:
        """Move the hyperparameters along the held hypergradient; log and restart where that is due."""
        self.outer.apply()
        self.outer_steps += 1
        self.check.conclude_step(module, self.outer)
        if self.logs(self.outer_steps) and self.last_report is not None:
            self._log(module, self.last_report)
        if self.restart_every is not None and self.outer_steps % self.restart_every == 0:
            assert self.batches is not None
            seed = self.batches.seed + 104_729 * self.outer_steps
            reinitialize(module, self.initial, self.parameters, seed)
            for optimizer in module.trainer.optimizers:
                optimizer.state.clear()

    def _log(self, module: LightningModule, report: OuterReport) -> None:
        """Log an outer step. To log another number, add it to ``metrics`` here, or as a field to ``OuterReport``.

        Loggers get it here, once, at the step that it belongs to: ``self.log(..., on_step=True)`` would repeat the
        last value at every later step, and drop those that fall between two of the Trainer's ``log_every_n_steps``.
        ``log_dict`` gives it to the progress bar, checkpoints and early stopping.
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

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next outer step depends on but ``initial``, which the owner adds."""
        position = self.batches.state_dict() if self.batches else self._saved_position or self._position
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return {"outer": self.outer.state_dict(), "batches": dict(position), **counters}

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
        self._saved_position = state["batches"] or {}
        if self.batches is not None and self._saved_position:
            self.batches.load_state_dict(self._saved_position)

    def summary(self) -> str:
        """Describe what was tuned, a line for each hyperparameter."""
        lines = [
            summary_line(h.name, self.outer.first[h.name], spread(h.values()))
            for h in self.outer.hyperparameters
            if h.built and h.name in self.outer.first
        ]
        return "\n  ".join([f"{self.owner} tuned in {self.outer_steps} outer steps:", *lines])


class OfLoop:
    """Attribute of an owner that its outer loop holds; not a property, which TorchScript would compile."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else getattr(instance.outer_loop, self._name)

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance.outer_loop, self._name, value)


class HasOuterLoop:
    """Counters of an :class:`OuterLoop`, and values, as attributes of the class that runs it."""

    # TorchScript would read annotations of the class.
    if TYPE_CHECKING:
        outer_loop: OuterLoop
        inner_steps: int
        outer_steps: int
        skipped_steps: int
        last_report: OuterReport | None
    else:
        inner_steps, outer_steps, skipped_steps, last_report = OfLoop(), OfLoop(), OfLoop(), OfLoop()

    def values(self) -> dict[str, Tensor]:
        """Return tuned values in natural units, by ``name`` or ``name/key``.

        Available from the start of ``fit``, or once a checkpoint has been loaded. A strategy that forks or spawns
        processes trains a copy of the object: there, read them in a hook, or from a checkpoint by
        :func:`tuned_values`.

        Raises:
            ValueError: The checkpoint that was loaded is of an earlier version, without values.
        """
        saved = getattr(self, "_saved", None)
        return saved_values(saved) if saved else self.outer_loop.outer.values()

    def export_values(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return :meth:`values` as plain numbers and lists, and write them to a file if a path is given.

        Args:
            path: File that ends with ``.json``, ``.yaml`` or ``.yml``; process 0 writes it. Folders are made.

        Raises:
            ValueError: There are no values yet, or the file's name ends otherwise.
        """
        numbers = {label: value.tolist() for label, value in self.values().items()}
        if not numbers:
            raise ValueError(
                f"There must be values to export. Got none from {type(self).__name__}; call it once fit has begun, or "
                "load a checkpoint first."
            )
        if path is not None:
            write_values(Path(path), numbers)
        return numbers

    def export(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return values as plain numbers and lists, and write them to a file; see :meth:`export_values`."""
        return self.export_values(path)

    def on_fit_end(self, *_: Any, **__: Any) -> None:
        """Report what was tuned, on process 0."""
        rank_zero_info(self.outer_loop.summary())


def state_of_outer_steps(checkpoint: Mapping[str, Any], key: str, owner: str) -> Mapping[str, Any] | None:
    """Return a module's part of a checkpoint; warn where it lacks, so that hyperparameters start again."""
    state: Mapping[str, Any] | None = checkpoint.get(key)
    if state is None:
        rank_zero_warn(
            f"The checkpoint must hold tuned values of {owner}. Got none: hyperparameters start from their initial "
            "values. Was it written by another module, or before fit began?"
        )
    return state


@rank_zero_only
def write_values(path: Path, numbers: Mapping[str, Any]) -> None:
    """Write numbers by name as JSON or YAML, as the file's name ends; a reader never sees half of a file."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"path must end with .json, .yaml or .yml. Got {str(path)!r}.")
    if path.suffix == ".json":
        text = json.dumps(dict(numbers), indent=2) + "\n"
    else:
        text = yaml.safe_dump(dict(numbers), sort_keys=False)
    replace_text(path, text)


class OuterLoopCallback(HasOuterLoop, Constructed, OneFitCallback):
    """Base of callbacks that run an outer loop."""

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load a state saved under another key, as with other hyperparameters, or in another order.

        Lightning would go on without it. Loaded, it is restored by name, or refused.
        """
        states = checkpoint.get("callbacks", {})
        found = [state for state in states.values() if isinstance(state, dict) and "outer" in state]
        if self.state_key not in states and found:
            self.load_state_dict(found[0])


@torch.no_grad()
def reinitialize(
    module: nn.Module, initial: Mapping[str, Tensor], parameters: Mapping[str, Tensor], seed: int
) -> None:
    """Draw new initial weights by each submodule's ``reset_parameters``, the same on every process.

    Submodules are reset if all parameters that they own are among ``parameters``: not what is frozen or tuned.
    Parameters that no ``reset_parameters`` reaches take their ``initial`` values.
    """
    inner = {id(p) for p in parameters.values()}
    for name, parameter in parameters.items():
        parameter.copy_(initial[name])
    with RandomStream(seed, next(iter(parameters.values())).device):
        for submodule in module.modules():
            reset = getattr(submodule, "reset_parameters", None)
            own = [id(p) for p in submodule.parameters(recurse=False)]
            if callable(reset) and own and inner.issuperset(own):
                reset()
