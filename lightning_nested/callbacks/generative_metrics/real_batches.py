"""Real data of a split, from the datamodule or from the loaders that the Trainer was given."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_nested.callbacks.generative_metrics.evaluators import Batches
from lightning_nested.trainer.lightning import given_loader, has_loader, request_loader
from lightning_nested.trainer.random_stream import RandomStream

Split = Literal["train", "val", "test"]


def has_split(trainer: Trainer, split: Split) -> bool:
    """Return True if the Trainer knows where the split's data is."""
    return getattr(trainer, "datamodule", None) is not None or has_loader(trainer, split)


def require_split(trainer: Trainer, split: Split) -> None:
    """Raise MisconfigurationException unless the Trainer knows where the split's data is."""
    if not has_split(trainer, split):
        splits: tuple[Split, ...] = ("train", "val", "test")
        others = [name for name in splits if has_loader(trainer, name)]
        raise MisconfigurationException(
            f"GenerativeMetrics(split={split!r}) compares with the data of that split's loader. Got no {split} "
            f"loader, and {' and '.join(others) or 'no other'} ones; give split= another value, or pass the Trainer "
            f"a datamodule or a {split} loader."
        )
    given = given_loader(trainer, split)
    if given is not None:
        _single(given, split)


def real_batches(trainer: Trainer, module: LightningModule, split: Split, seed: int) -> Batches:
    """Return a function for a pass over all data of a split, as ``module.real_data`` takes it from a batch.

    Each process gets the whole split. The Trainer's own iteration over the loader is not disturbed.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)

    def batches() -> Iterable[Any]:
        # A shuffling loader draws from the global stream.
        with RandomStream(seed):
            if datamodule is not None:
                loader = getattr(datamodule, f"{split}_dataloader")()
            else:
                loader = request_loader(trainer, split)
            return [_real(module, batch) for batch in _whole(_single(loader, split))]

    return batches


def _real(module: LightningModule, batch: Any) -> Any:
    """Return ``[data, …]`` of a batch, where the module says what its data is."""
    real_data = getattr(module, "real_data", None)
    if real_data is None:
        return batch
    further = batch[1:] if isinstance(batch, Sequence) and not isinstance(batch, str) else []
    return [real_data(batch)[0], *further]


def _single(loader: Any, split: str) -> Iterable[Any]:
    if isinstance(loader, Sequence) and len(loader) == 1:
        loader = loader[0]
    if isinstance(loader, Mapping | Sequence | Tensor) or not isinstance(loader, Iterable):
        raise MisconfigurationException(
            f"GenerativeMetrics takes the real images from a LightningDataModule, or from one {split} loader. Got a "
            f"{type(loader).__name__}; give one DataLoader."
        )
    return loader


def _whole(loader: Iterable[Any]) -> Iterable[Any]:
    """Return a loader of all data in this process, apart from the given one.

    One for training may drop its last, smaller batch, and a distributed one has a share. Workers that persist are the
    Trainer's.
    """
    if not isinstance(loader, DataLoader):
        return loader
    dataset: Any = loader.dataset
    shares = isinstance(loader.sampler, DistributedSampler)
    # A sampler of another length chooses examples, or repeats them.
    if isinstance(dataset, IterableDataset) or not (
        shares or (loader.drop_last and len(cast(Any, loader.sampler)) == len(dataset))
    ):
        ours = copy.copy(loader)
        ours._iterator = None
        return ours
    kept = ("batch_size", "collate_fn", "num_workers")
    return DataLoader(dataset, **{name: getattr(loader, name) for name in kept})
