"""Step learning-rate schedulers in manual optimization, where the Trainer leaves them to the module."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ReduceLROnPlateau


def step_schedulers(module: LightningModule, interval: str, count: int) -> None:
    """Step the schedulers of an interval whose frequency divides ``count``.

    A plateau scheduler of the interval ``"epoch"`` waits for :func:`step_plateau_schedulers`: its metric may be one of
    the epoch's validation. One of ``"step"`` steps here on what was logged last.

    Raises:
        MisconfigurationException: The metric of a plateau scheduler was not logged.
    """
    for config in module.trainer.lr_scheduler_configs:
        plateau = isinstance(config.scheduler, ReduceLROnPlateau)
        if config.interval != interval or count % config.frequency or (plateau and interval == "epoch"):
            continue
        module.lr_scheduler_step(config.scheduler, _monitored(module, config.scheduler) if plateau else None)


def step_plateau_schedulers(module: LightningModule) -> None:
    """Step plateau schedulers of the interval ``"epoch"`` on the metric that they monitor, at an epoch's end.

    Raises:
        MisconfigurationException: The metric was not logged.
    """
    for config in module.trainer.lr_scheduler_configs:
        plateau = isinstance(config.scheduler, ReduceLROnPlateau) and config.interval == "epoch"
        if plateau and (module.current_epoch + 1) % config.frequency == 0:
            module.lr_scheduler_step(config.scheduler, _monitored(module, config.scheduler))


def _monitored(module: LightningModule, scheduler: Any) -> Any:
    """Return the metric that the scheduler itself names: Lightning drops the key ``"monitor"`` here."""
    monitor = getattr(scheduler, "monitor", None)
    metric = module.trainer.callback_metrics.get(str(monitor))
    if metric is None:
        raise MisconfigurationException(
            f"ReduceLROnPlateau monitors {monitor!r}, which was not logged. "
            f"Got {sorted(module.trainer.callback_metrics)}; log it with self.log, or step the scheduler after it."
        )
    return metric
