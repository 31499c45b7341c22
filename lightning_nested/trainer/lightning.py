"""What the callback and the module with nested loops both need from a running Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor


def reduction(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """The mean over processes; None where there is one."""
    if trainer.world_size == 1:
        return None
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="mean")


def transfer(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """A batch on the module's device, through the hooks that the Trainer's own batches pass."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def step_arguments(step: Callable[..., Any], batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """What the Trainer would call ``training_step`` or ``validation_step`` with, given its signature."""
    arguments = [batch]
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        arguments.append(batch_idx)
    if is_param_in_hook_signature(step, "dataloader_idx", explicit=True):
        arguments.append(0)
    return tuple(arguments)
