"""Optimizers of the image and the language module, with a learning-rate scheduler or without."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler


def with_scheduler(
    module: LightningModule, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None
) -> OptimizerLRScheduler:
    """Return what ``configure_optimizers`` of a module with one optimizer returns.

    Args:
        module: The module, whose parameters all are moved.
        optimizer: From parameters to optimizer.
        scheduler: From optimizer to learning-rate scheduler, stepped after each epoch; None: there is none.
    """
    made = optimizer(module.parameters())
    if scheduler is None:
        return made
    schedule = scheduler(made)
    # only a plateau scheduler waits for a metric
    monitor = getattr(schedule, "monitor", None)
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "monitor": monitor}}
