"""The random state of every process, in a form that checkpoints load with ``weights_only=True``."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer


def random_states(trainer: Trainer) -> list[dict[str, Any]]:
    """States of torch, NumPy and ``random``, one dictionary per process; called on all of them together."""
    numpy_state: Any = np.random.get_state()
    device = trainer.strategy.root_device
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (numpy_state[0], numpy_state[1].tolist(), *(float(x) for x in numpy_state[2:])),
        "python": random.getstate(),
    }
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, state)
    return states


def restore_random_state(states: Sequence[dict[str, Any]], rank: int) -> None:
    """Continue where a process of the saved run was.

    A run with more processes than the saved one had seeds each of the others by its rank; it warns.
    """
    if rank >= len(states):
        if rank == len(states):
            warnings.warn(
                f"The checkpoint has the random state of {len(states)} processes; the others are seeded by rank.",
                stacklevel=2,
            )
        seed = (torch.initial_seed() + 7_368_787 * rank) % 2**63
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        return
    state = states[rank]
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), int(position), int(has_gauss), gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
