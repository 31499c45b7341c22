"""Endless, resumable stream of batches for the outer loss, apart from the Trainer's own validation loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lightning_nested.linalg.saved import require_keys
from lightning_nested.trainer.lightning import (
    is_sequential,
    request_validation_loader,
    shard,
    shut_down_workers,
    with_loaders,
)
from lightning_nested.trainer.random_stream import RandomStream

_NO_LOADER = (
    "The outer loss needs validation data, and there is none. Got a Trainer without a validation dataloader; pass "
    "val_dataloaders= to fit, define val_dataloader() in the module or datamodule, or give an outer dataloader: "
    "HypergradientCallback(outer_dataloader=...), or the module's method outer_dataloader()."
)


class OuterBatches:
    """Batches for the outer loss, in rounds over a loader, with random numbers of their own.

    Round r uses the seed (seed, r, rank), so the position is two numbers and no generator state is saved. The
    loader is a new instance with the same dataset, sampler and options: the Trainer's validation is not disturbed.
    Under ``reload_dataloaders_every_n_epochs`` it is asked for again as often as the Trainer's own.

    Args:
        trainer: Trainer of the run, whose validation loader is taken unless ``loader`` is given.
        loader: Loader, or function that returns one.
        seed: Base seed; the same on every process.
    """

    def __init__(self, trainer: Trainer, loader: Any = None, *, seed: int) -> None:
        self.seed, self._rank = seed, trainer.global_rank
        self._device = trainer.strategy.root_device
        asks = loader is None or (callable(loader) and not isinstance(loader, Iterable))

        def load() -> Any:
            with RandomStream(seed, self._device):
                if not asks:
                    return _prepare(trainer, loader)
                return _prepare(trainer, request_validation_loader(trainer) if loader is None else loader())

        # Functions: a copy of what holds these batches must not copy the Trainer.
        self._load: Callable[[], Any] = load
        self._epoch: Callable[[], int] = lambda: trainer.current_epoch
        every: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        self._reload_every = every if asks else 0
        self._loader, self._loaded_in = load(), trainer.current_epoch
        self.round, self.position = 0, 0
        self.last: Any = None
        self._iterator: Iterator[Any] | None = None
        self._stream = self._new_stream()
        self._ahead: tuple[Any, int, int] | None = None  # a batch that was looked at, and its position

    @property
    def loader(self) -> Any:
        """The loader of the batches."""
        return self._loader

    def next(self) -> Any:
        """Return the next batch, on the CPU; the end of the loader begins the next round.

        Raises:
            MisconfigurationException: The loader is empty, or a one-pass iterator is used up.
        """
        if self._ahead is not None:
            (self.last, self.round, self.position), self._ahead = self._ahead, None
            return self.last
        if self._reload_every and self._epoch() - self._loaded_in >= self._reload_every:
            self._loader, self._loaded_in = self._load(), self._epoch()
            if self.position:
                self._next_round()
        with self._stream:
            if self._iterator is None:
                self._iterator = self._start()
            batch = next(self._iterator, _END)
        if batch is _END:
            if self.position == 0:
                raise MisconfigurationException(
                    "The outer dataloader must yield at least one batch. Got an empty one: check the size of the "
                    "validation set, its batch size with drop_last=True, and that it is no one-pass generator."
                )
            self._next_round()
            return self.next()
        self.position += 1
        self.last = batch
        return batch

    @property
    def index(self) -> int:
        """Index of the last batch in its round, as the Trainer's validation would count it."""
        return max(self.position - 1, 0)

    def look_ahead(self) -> OuterBatches:
        """Return a stream of the next batch alone, which stays the next one of this stream."""
        position, last = (self.round, self.position), self.last
        batch = self.next()
        ahead = LastBatch(self)
        self._ahead = batch, self.round, self.position
        (self.round, self.position), self.last = position, last
        return ahead

    def loss_stream(self) -> RandomStream:
        """Return a stream for the loss of the last batch, apart from the batches', which resuming draws again."""
        return self._new_stream(15_485_863 * self.position)

    def apart(self) -> AbstractContextManager[None]:
        """Keep the global random streams once, for a batch and its loss; see :meth:`RandomStream.apart`."""
        return self._stream.apart()

    def state_dict(self) -> dict[str, int]:
        """Return seed, round and position."""
        return {"seed": self.seed, "round": self.round, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore a position: draw and drop the batches before it in its round.

        Raises:
            ValueError: A key lacks.
        """
        require_keys(state, ("seed", "round", "position"), "the outer batches")
        self.seed, self.round, self._ahead = state["seed"], state["round"], None
        self.position, self._iterator, self._stream = 0, None, self._new_stream()
        for _ in range(state["position"]):
            self.next()

    def _next_round(self) -> None:
        self.round, self.position, self._iterator = self.round + 1, 0, None
        self._stream = self._new_stream()

    def _new_stream(self, offset: int = 0) -> RandomStream:
        return RandomStream(self._round_seed() + offset, self._device)

    def _round_seed(self) -> int:
        # Large odd factors keep (seed, round, rank) apart without hashing.
        return self.seed + 1_000_003 * (self.round + 1) + 7_368_787 * self._rank

    def _start(self) -> Iterator[Any]:
        sampler = getattr(self._loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(self.round)
        generator = getattr(self._loader, "generator", None)
        # A DataLoader's generator is our own, see _own_copy.
        if isinstance(self._loader, DataLoader) and generator is not None:
            generator.manual_seed(self._round_seed())
        return iter(self._loader)


def end_workers(batches: OuterBatches) -> None:
    """End the worker processes of a stream now, also where the traceback of an exception holds the stream."""
    shut_down_workers(vars(batches).get("_iterator"))
    batches._iterator = None


class LastBatch(OuterBatches):
    """Repeat the last batch of a stream, with the same random numbers; the stream keeps its position."""

    def __init__(self, stream: OuterBatches) -> None:
        self.__dict__.update(stream.__dict__)

    @override
    def next(self) -> Any:
        return self.last


_END = object()


def _prepare(trainer: Trainer, loader: Any) -> Any:
    """Return the first loader of a collection, as an instance of our own, sharded over processes."""
    if loader is None or (isinstance(loader, (list, tuple, dict)) and not loader):
        raise MisconfigurationException(_NO_LOADER)
    if isinstance(loader, CombinedLoader):
        if not is_sequential(loader):
            return _Joined(with_loaders(loader, [_prepare(trainer, single) for single in loader.flattened]))
        loader = loader.flattened[0]
    elif not isinstance(loader, DataLoader):
        flattened = CombinedLoader(loader, "sequential").flattened
        loader = flattened[0] if flattened else loader
    if not isinstance(loader, Iterable):
        raise MisconfigurationException(
            f"The outer dataloader must be iterable. Got {type(loader).__name__}; give a DataLoader."
        )
    if isinstance(loader, Iterator):
        raise MisconfigurationException(
            "The outer dataloader must be iterable more than once. Got a one-pass generator "
            f"({type(loader).__name__}), whose batches the Trainer's validation would miss; give a DataLoader."
        )
    return _own_copy(shard(trainer, loader)) if isinstance(loader, DataLoader) else loader


def _own_copy(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader with the same dataset and options that shares neither workers nor random numbers with this."""
    # A shallow copy, because not every subclass can be built again from its attributes.
    ours = copy.copy(loader)
    # Persistent workers.
    ours._iterator = None
    given = loader.generator
    if given is None:
        return ours
    generator = torch.Generator(given.device)
    ours.generator = generator
    holders: dict[str, Any] = {"sampler": ours, "batch_sampler": ours.batch_sampler}
    for name, holder in holders.items():
        sampler: Any = getattr(holder, "sampler", None)
        if getattr(sampler, "generator", None) is None:
            continue
        sampler = copy.copy(sampler)
        sampler.generator = generator
        if name == "batch_sampler":
            sampler, batches = copy.copy(holder), sampler
            sampler.sampler = batches
        # A DataLoader guards these names, for it may have iterators.
        ours.__dict__[name] = sampler
    return ours


class _Joined:
    """Combined batches without the indices that a CombinedLoader adds, as ``validation_step`` gets them."""

    def __init__(self, loader: CombinedLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        for batch, _, _ in self._loader:
            yield batch
