"""Epochs of so many steps, for losses that need no batches."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_nested.arguments import at_least, checked


@checked
class StepsDataModule(LightningDataModule):
    """Epochs of ``steps`` training steps whose batches say nothing: for modules that hold their data themselves.

    Whole-batch training, learned data or a closed formula need no loader, but the Trainer counts by batches. An epoch
    is then as long as an outer step needs, such as ``num_steps`` of ``Unrolled``. Each batch is a zero of shape
    (1,): Lightning weighs what is logged by the size of a batch.

    Args:
        steps: Training steps of an epoch, on each process.
        val_steps: Batches of a validation, and of a round of outer steps over the validation data.

    Raises:
        ValueError: A number below 1.

    Example:
        >>> data = StepsDataModule(steps=20)
        >>> [tuple(batch.shape) for batch in data.train_dataloader()] == [(1,)] * 20
        True
    """

    def __init__(self, steps: int = 100, val_steps: int = 1) -> None:
        super().__init__()
        at_least(1, steps=steps, val_steps=val_steps)
        self.steps, self.val_steps = steps, val_steps

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self._zeros(self.steps)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._zeros(self.val_steps)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._zeros(self.val_steps)

    def _zeros(self, count: int) -> DataLoader[Any]:
        processes = 1 if self.trainer is None else self.trainer.world_size
        # The Trainer shares the examples of a loader out over processes.
        return DataLoader(torch.zeros(count * processes, 1), batch_size=None)  # type: ignore[arg-type]
