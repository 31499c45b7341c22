"""Report on a tuned learning rate, beside the same training at a constant one and under cosine: a table, a figure."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.callbacks.hypergradient import HypergradientCallback
from lightning_nested.demos.report import Report
from lightning_nested.figures.schedule import schedule_figure
from lightning_nested.hyperparameters import LearningRate
from lightning_nested.linalg.saved import require_keys
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.reference_runs import fit_like, test_like, validate_like
from lightning_nested.trainer.run_folder import run_folder

_ARMS = {"constant": "constant", "cosine": "cosine to zero", "learned": "learned"}


@checked
class ScheduleReport(Report):
    """Compare, at the end of ``fit``, a tuned :class:`LearningRate` with a constant one and with cosine.

    A copy of the untrained module is trained twice more without tuning: with its own ``configure_optimizers``, and
    with cosine from the same rate to zero; as many steps, with the same batches and random numbers. The three are then
    validated and tested, which is the only use of the test set.

    Prints a table; writes ``results.json`` and the figure ``<name>.png`` into the folder of the run's logger (without
    a logger into ``default_root_dir``). The module must log ``test_loss`` in ``test_step``, and the callback of the
    rate must stand before this one.

    Args:
        name: Name of the figure's file.

    Attributes:
        results: Content of ``results.json``; empty before the end of ``fit``.

    Raises:
        MisconfigurationException: In ``setup``: more than one process, nothing before it tunes a learning rate, or
            there is no ``test_step``.
    """

    def __init__(self, name: str = "schedule") -> None:
        super().__init__(name)
        self._rates: list[float] = []
        self._initial: LightningModule
        self._tuner: HypergradientCallback
        self._stream: RandomStream
        self._began = 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self.use.changed:
            self._rates = []
        self._require_one_process(trainer)
        self._tuner = self._find_tuner(trainer)
        self._require_test_step(pl_module, "test_loss")
        self._initial = copy.deepcopy(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The references start from this random state: the tuning callback does not draw from it, so batches agree.
        self._stream = RandomStream.snapshot(trainer.strategy.root_device)
        self._began = time.perf_counter()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._rates.append(float(optimizer.param_groups[0]["lr"]))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = {"learned": time.perf_counter() - self._began}
        # A copy, because pl_module belongs to its own Trainer.
        learned = copy.deepcopy(self._initial)
        learned.load_state_dict(pl_module.state_dict())
        modules = {"learned": learned}
        for arm in ("constant", "cosine"):
            began = time.perf_counter()
            modules[arm] = copy.deepcopy(self._initial)
            if arm == "cosine":
                under_cosine(modules[arm], trainer.global_step)
            with self._stream.replay():
                fit_like(trainer, modules[arm])
            seconds[arm] = time.perf_counter() - began
        scores = {arm: self._scores(trainer, modules[arm]) for arm in _ARMS}
        metrics = {key: {arm: scores[arm][key] for arm in _ARMS} for key in scores["learned"]}
        self.results = {
            **metrics,
            "seed": getattr(trainer.datamodule, "seed", None),  # type: ignore[attr-defined]
            "steps": trainer.global_step,
            "outer_steps": self._tuner.outer_steps,
            "skipped_outer_steps": self._tuner.skipped_steps,
            "rates": self._rates,
            "seconds_by_training": seconds,
        }
        losses = {_ARMS[arm]: metrics["test_loss"][arm] for arm in _ARMS}
        figure = schedule_figure(self._rates, losses, self._tuner.warmup_steps)
        self._write(trainer, run_folder(trainer), figure, trainer.global_step, self._table())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rates": list(self._rates)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        require_keys(state_dict, ("rates",), "ScheduleReport")
        self._rates = list(state_dict["rates"])

    def _scores(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        # A pass over a loader draws random numbers.
        with self._stream.replay():
            found = {**validate_like(trainer, module), **test_like(trainer, module)}
        if "test_loss" not in found:
            raise MisconfigurationException(
                f"ScheduleReport needs 'test_loss'. Got {sorted(found)} from {type(module).__name__}; add "
                "self.log('test_loss', ...) to its test_step."
            )
        return {key: float(value) for key, value in found.items()}

    def _find_tuner(self, trainer: Trainer) -> HypergradientCallback:
        """Return the callback that tunes the rate."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, HypergradientCallback) and any(
                isinstance(h, LearningRate) for h in callback.outer.hyperparameters
            ):
                return callback
        raise MisconfigurationException(
            "ScheduleReport judges a tuned learning rate. Got a Trainer in which no callback before it tunes one; put "
            "HypergradientCallback(LearningRate()) before it."
        )

    def _table(self) -> str:
        keys = [key for key in ("val_loss", "test_loss", "test_accuracy") if key in self.results]
        titles = "".join(f"{key:>15}" for key in keys)
        lines = [f"\n{'learning rate':<18}{titles}{'seconds':>10}", "-" * (28 + len(titles))]
        for arm, label in _ARMS.items():
            numbers = "".join(f"{self.results[key][arm]:>15.4f}" for key in keys)
            lines.append(f"{label:<18}{numbers}{self.results['seconds_by_training'][arm]:>10.1f}")
        lines.append("-" * (28 + len(titles)))
        lines.append(f"rate {self._rates[0]:.3g}, at the end {self._rates[-1]:.3g}\n")
        return "\n".join(lines)


def under_cosine(module: LightningModule, steps: int) -> None:
    """Let the optimizer of a module follow a cosine to zero, in place of a scheduler of its own."""
    module.configure_optimizers = partial(_cosine, module, steps)  # type: ignore[method-assign]


def _cosine(module: LightningModule, steps: int) -> Any:
    own: Any = type(module).configure_optimizers(module)
    optimizer = own["optimizer"] if isinstance(own, dict) else own
    if isinstance(optimizer, list | tuple):
        optimizer = optimizer[0][0] if isinstance(optimizer[0], list | tuple) else optimizer[0]
    for group in optimizer.param_groups:
        group["lr"] = group.pop("initial_lr", group["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
