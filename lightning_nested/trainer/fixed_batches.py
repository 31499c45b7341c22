"""Batches that a measurement keeps for a whole run, with their random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_nested.linalg.processes import of_all_processes
from lightning_nested.linalg.saved import require_keys
from lightning_nested.trainer.random_stream import RandomStream, base_seed


class FixedBatches:
    """Store of the first batch at each place of a step, evaluated with the same random numbers every time."""

    def __init__(self, trainer: Trainer) -> None:
        self._rank, self._device = trainer.global_rank, trainer.strategy.root_device
        self.seed = base_seed(trainer)
        self._batches: list[Any] = []

    def __len__(self) -> int:
        return len(self._batches)

    def get(self, place: int, batch: Any) -> tuple[Any, RandomStream]:
        """Return the batch of a place and its random numbers; ``batch`` is stored if it is the first one there."""
        while len(self._batches) <= place:
            self._batches.append(apply_to_collection(batch, Tensor, lambda t: t.detach().clone()))
        seed = self.seed + 7_368_787 * self._rank + 104_729 * place
        return self._batches[place], RandomStream(seed, self._device)

    def state_dict(self) -> dict[str, Any]:
        """Return the batches of all processes; called on all of them together."""
        mine = apply_to_collection(self._batches, Tensor, lambda t: t.cpu())
        return {"seed": self.seed, "batches": of_all_processes(mine)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore saved batches; a process that had none stores its next ones."""
        require_keys(state, ("seed", "batches"), "the fixed batches")
        self.seed = state["seed"]
        every = state["batches"]
        mine = every[self._rank] if self._rank < len(every) else []
        self._batches = apply_to_collection(list(mine), Tensor, lambda t: t.to(self._device))
