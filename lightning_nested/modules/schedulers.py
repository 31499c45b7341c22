"""Learning-rate schedulers in manual optimization, where the Trainer leaves them to the module."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ReduceLROnPlateau


def step_schedulers(module: LightningModule, interval: str, count: int) -> None:
    """Step those of an interval whose frequency divides ``count``; plateau schedulers wait for the epoch's end."""
    for config in module.trainer.lr_scheduler_configs:
        plateau = isinstance(config.scheduler, ReduceLROnPlateau)
        if config.interval == interval and not plateau and count % config.frequency == 0:
            module.lr_scheduler_step(config.scheduler, None)


def step_plateau_schedulers(module: LightningModule) -> None:
    """At an epoch's end: step plateau schedulers on the metric that they monitor.

    The name is the scheduler's own: Lightning drops the ``"monitor"`` key in manual optimization.

    Raises:
        MisconfigurationException: The metric was not logged.
    """
    for config in module.trainer.lr_scheduler_configs:
        if not isinstance(config.scheduler, ReduceLROnPlateau):
            continue
        if (module.current_epoch + 1) % config.frequency == 0:
            monitor = getattr(config.scheduler, "monitor", None)
            metric = module.trainer.callback_metrics.get(str(monitor))
            if metric is None:
                raise MisconfigurationException(
                    f"ReduceLROnPlateau monitors {monitor!r}, which was not logged. "
                    f"Got {sorted(module.trainer.callback_metrics)}."
                )
            module.lr_scheduler_step(config.scheduler, metric)
