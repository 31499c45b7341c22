"""Random streams apart from the global one, and the random state of every process for checkpoints."""

from __future__ import annotations

import ctypes
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from lightning_nested.linalg.processes import of_all_processes


class RandomStream:
    """Random stream of torch, NumPy and ``random`` that leaves the global ones as they are.

    >>> stream = RandomStream(0)
    >>> with stream:
    ...     first = torch.rand(1)
    >>> with RandomStream(0):
    ...     bool(torch.rand(1) == first)
    True
    """

    def __init__(self, seed: int, device: torch.device | None = None) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._outside: list[tuple[Any, ...] | None] = []
        self._inside: tuple[Any, ...] | None = None
        self._seed = seed % 2**32
        self._seeded: bytes | None = None  # NumPy's numbers right after the seed was set

    def __enter__(self) -> RandomStream:
        self._outside.append(self._leave())
        self._begin()
        return self

    def _begin(self) -> None:
        if self._inside is None:
            random.seed(self._seed)
            self._seed_numpy()
            torch.random.default_generator.manual_seed(self._seed)
            if self._cuda is not None:
                with torch.cuda.device(self._cuda):
                    torch.cuda.manual_seed(self._seed)
        else:
            self._restore(self._inside)

    def _seed_numpy(self) -> None:
        np.random.seed(self._seed)
        self._seeded = _numpy_numbers()

    @classmethod
    def snapshot(cls, device: torch.device | None = None) -> RandomStream:
        """Return a stream that begins where the global one is now."""
        stream = cls(0, device)
        stream._inside = stream._capture()
        return stream

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Draw from the stream's current position inside, and return to it: each replay draws the same."""
        outside = self._leave()
        self._begin()
        try:
            yield
        finally:
            self._return(outside)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Keep the global streams once for all that are used inside, between which nothing is drawn.

        That is NumPy's for the most part: reading its state takes as long as a step of a small network.
        """
        global _kept
        outside, before, _kept = self._capture(), _kept, True
        try:
            yield
        finally:
            _kept = before
            self._restore(outside)

    def __exit__(self, *_: object) -> None:
        same = self._seeded is not None and _numpy_numbers() == self._seeded
        self._inside = self._capture(None if same else np.random.get_state())
        self._return(self._outside.pop())

    def _leave(self) -> tuple[Any, ...] | None:
        """Return the state of the streams that are left; None where it is kept already."""
        global _kept
        if _kept:
            _kept = False
            return None
        return self._capture()

    def _return(self, outside: tuple[Any, ...] | None) -> None:
        global _kept
        if outside is None:
            _kept = True
        else:
            self._restore(outside)

    def _capture(self, numpy: Any = ...) -> tuple[Any, ...]:
        """Return the state of all streams; ``numpy`` None: as it was when it was seeded."""
        cuda = torch.cuda.get_rng_state(self._cuda) if self._cuda is not None else None
        numpy = np.random.get_state() if numpy is ... else numpy
        return torch.get_rng_state(), numpy, random.getstate(), cuda

    def _restore(self, state: tuple[Any, ...]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is None:
            self._seed_numpy()
        else:
            np.random.set_state(state[1])
            self._seeded = None
        random.setstate(state[2])
        if self._cuda is not None:
            torch.cuda.set_rng_state(state[3], self._cuda)


_kept = False  # whether the global streams are kept by RandomStream.apart
_MT19937 = 2500  # bytes: 624 words and a position


def _numpy_numbers() -> bytes | None:
    """Return the memory of NumPy's global generator, in a hundredth of the time of its state; None where it is another.

    It says nothing of the second number of a pair of normal ones, which there is none of after a seed.
    """
    bits = getattr(np.random, "get_bit_generator", lambda: None)()
    return ctypes.string_at(bits.ctypes.state_address, _MT19937) if type(bits) is np.random.MT19937 else None


def base_seed(trainer: Trainer) -> int:
    """Return a seed that every process agrees on, without drawing from the global stream."""
    return int(trainer.strategy.broadcast(torch.initial_seed() % 2**31))


def seed_processes_apart(trainer: Trainer) -> None:
    """Let each process but the first draw random numbers of its own from now on."""
    if trainer.world_size > 1:
        # Every process takes part in agreeing on it.
        seed = base_seed(trainer)
        if trainer.global_rank > 0:
            torch.manual_seed(seed + 7_368_787 * trainer.global_rank)


def random_states(trainer: Trainer) -> list[dict[str, Any]]:
    """Return states of torch, NumPy and ``random``, one dictionary per process; called on all of them together."""
    numpy_state: Any = np.random.get_state()
    device = trainer.strategy.root_device
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (numpy_state[0], numpy_state[1].tolist(), *(float(x) for x in numpy_state[2:])),
        "python": random.getstate(),
    }
    return of_all_processes(state)


def restore_random_state(states: Sequence[dict[str, Any]], rank: int) -> None:
    """Restore the random state of a process; warn where the saved run had fewer, and seed by rank."""
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
