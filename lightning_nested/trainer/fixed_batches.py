"""The batches that a measurement keeps for a whole run, and the random numbers that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_nested.trainer.random_stream import RandomStream, base_seed


class FixedBatches:
    """The first batch that came to each place of a step, with the same random numbers every time.

    Args:
        trainer: Decides seed, device and processes.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._rank, self._device = trainer.global_rank, trainer.strategy.root_device
        self.seed = base_seed(trainer)
        self._batches: list[Any] = []

    def __len__(self) -> int:
        return len(self._batches)

    def get(self, place: int, batch: Any) -> tuple[Any, RandomStream]:
        """The batch of a place, which ``batch`` becomes if it is the first one there, and its random numbers."""
        while len(self._batches) <= place:
            self._batches.append(apply_to_collection(batch, Tensor, lambda t: t.detach().clone()))
        return self._batches[place], RandomStream(
            self.seed + 7_368_787 * self._rank + 104_729 * place, self._device
        )

    def state_dict(self) -> dict[str, Any]:
        """Batches of every process; called on all of them together."""
        mine = apply_to_collection(self._batches, Tensor, lambda t: t.cpu())
        every = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            every = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(every, mine)
        return {"seed": self.seed, "batches": every}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with saved batches; a process that had none begins with its next ones."""
        self.seed = state["seed"]
        every = state["batches"]
        mine = every[self._rank] if self._rank < len(every) else []
        self._batches = apply_to_collection(list(mine), Tensor, lambda t: t.to(self._device))
