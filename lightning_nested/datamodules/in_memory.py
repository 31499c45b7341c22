"""Labelled images held in memory, on request with wrong training labels or a long tail of rare classes."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_nested.arguments import at_least, checked, within

Batch = tuple[Tensor, ...]


class LabelledImages(NamedTuple):
    """Images ``(n, channels, height, width)`` as the source stores them, and class numbers ``(n,)``."""

    images: Tensor
    labels: Tensor


class TensorBatches(Dataset[Batch]):
    """A dataset of tensors of equal length with one row per example that is read a batch at a time.

    ``DataLoader`` asks a dataset that has ``__getitems__`` for a whole batch, so that one indexing operation
    per tensor replaces ``batch_size`` single reads and their collation. The sampler stays an ordinary one:
    Lightning can replace it by a distributed sampler, and the order under a seed is the usual order.

    Example:
        >>> data = TensorBatches(torch.arange(10), torch.arange(10) ** 2)
        >>> next(iter(data.loader(batch_size=3)))
        (tensor([0, 1, 2]), tensor([0, 1, 4]))
    """

    def __init__(self, *tensors: Tensor) -> None:
        if len({len(tensor) for tensor in tensors}) != 1:
            raise ValueError(f"Tensors of equal length are needed. Got lengths {[len(t) for t in tensors]}.")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Batch:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = torch.as_tensor(indices)
        return tuple(tensor.index_select(0, rows) for tensor in self.tensors)

    def loader(self, *, batch_size: int, num_workers: int = 0, **options: Any) -> DataLoader[Batch]:
        """Return a ``DataLoader`` of this dataset, with its ``options`` ``shuffle`` and ``drop_last``."""
        options |= {"num_workers": num_workers, "persistent_workers": num_workers > 0}
        # A batch is a tuple already, which `tuple` hands on; worker processes could not pickle a lambda.
        return DataLoader(self, batch_size=batch_size, collate_fn=tuple, **options)


@checked
class InMemoryDataModule(LightningDataModule):
    """Train, validation and test images as float tensors, batched without per-example work.

    A subclass says where images come from by ``load``. The split is *plain random* (not stratified): the
    first ``train_size`` positions of a seeded permutation of the pool are training images, the next
    ``val_size`` validation images; the test images are the source's own, or what remains of the pool. The
    split does not depend on the other options, so runs that differ in their labels see the same images.

    ``wrong_label_fraction`` of the training images, rounded to a whole number, get a wrong label: with
    ``wrong_labels="symmetric"`` drawn uniformly from the *other* classes, with ``"pairwise"`` the next class.
    Validation and test labels are always the right ones.

    With ``imbalance`` above 1 class c keeps a share imbalance^(−c/(C−1)) of its training images, so that the
    first class has ``imbalance`` times as many as the last (Cui et al. 2019, CVPR). Validation and test images
    stay balanced.

    Args:
        train_size: Number of training images.
        val_size: Number of validation images.
        wrong_label_fraction: Share of training images with a wrong label, in [0, 1].
        wrong_labels: Which labels wrong ones are.
        imbalance: Training images of the first class for one of the last; above 1 some of the ``train_size`` are
            left out.
        use_clean_labels: Train on the right labels of the same images: the reference a cleaner can reach.
        with_index: Training batches are ``(image, label, index)``, where ``index`` numbers the training
            images from 0; needed by one weight per example.
        batch_size: Images per training batch.
        val_batch_size: Images per validation or test batch; None: ``batch_size``.
        seed: Seed of the split and of the wrong labels; None: the seed of the run (``seed_everything``), so
            that runs over seeds vary the data as well as the training. Known after ``setup``.
        num_workers: Loader processes. 0 is fastest for most uses, since nothing is decoded.
        symmetric: Pixels in [−1, 1], as generators with tanh make them, instead of [0, 1].
        drop_last: Leave out a short last training batch.
    """

    num_classes: int = 10
    max_pixel: float = 255.0  # of the source's images, which are scaled by it
    pad_to: int | None = None  # side after padding with the lowest value

    # Set by `setup`.
    train_images: Tensor  # (n, channels, height, width), where n is train_size unless there is an imbalance
    train_labels: Tensor  # (n,), as given, so with the wrong ones
    train_labels_clean: Tensor  # (n,), the right ones
    wrong: Tensor  # (n,) boolean, where the two differ
    val_images: Tensor
    val_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __init__(
        self,
        *,
        train_size: int,
        val_size: int,
        wrong_label_fraction: float = 0.0,
        wrong_labels: Literal["symmetric", "pairwise"] = "symmetric",
        imbalance: float = 1.0,
        use_clean_labels: bool = False,
        with_index: bool = False,
        batch_size: int = 128,
        val_batch_size: int | None = None,
        seed: int | None = 0,
        num_workers: int = 0,
        symmetric: bool = False,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, train_size=train_size, batch_size=batch_size, val_batch_size=val_batch_size)
        at_least(0, val_size=val_size, seed=seed, num_workers=num_workers)
        within(0, 1, wrong_label_fraction=wrong_label_fraction)
        at_least(1, imbalance=imbalance)
        self.train_size, self.val_size, self.seed = train_size, val_size, seed
        self.wrong_label_fraction, self.use_clean_labels = wrong_label_fraction, use_clean_labels
        self.wrong_labels: Literal["symmetric", "pairwise"] = wrong_labels
        self.imbalance = imbalance
        self.with_index, self.symmetric, self.drop_last = with_index, symmetric, drop_last
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.num_workers = num_workers
        self._ready = False

    @abstractmethod
    def load(self) -> tuple[LabelledImages, LabelledImages | None]:
        """Return the pool that is split, and the test set of the source if it has one."""

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._ready:  # every stage uses the same split; `fit` then `test` must not read twice
            return
        pool, test = self.load()
        size = len(pool.labels)
        if self.train_size + self.val_size > size:
            raise ValueError(
                f"`train_size + val_size` must be at most the {size} images of {type(self).__name__}. "
                f"Got {self.train_size} + {self.val_size}. Ask for fewer."
            )
        if self.seed is None:
            self.seed = seed_of_the_run()
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(size, generator=generator)
        train, val, rest = order.tensor_split([self.train_size, self.train_size + self.val_size])

        if self.imbalance > 1:
            train = train[long_tail(pool.labels[train].long(), self.imbalance, self.num_classes)]
        self.train_images, self.train_labels_clean = self._scaled(pool, train)
        self.train_labels = with_wrong_labels(
            self.train_labels_clean, self.wrong_label_fraction, self.num_classes, generator, self.wrong_labels
        )
        self.wrong = self.train_labels != self.train_labels_clean
        self.val_images, self.val_labels = self._scaled(pool, val)
        test, rows = (pool, rest) if test is None else (test, torch.arange(len(test.labels)))
        self.test_images, self.test_labels = self._scaled(test, rows)
        self._ready = True

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        labels = self.train_labels_clean if self.use_clean_labels else self.train_labels
        index = (torch.arange(len(labels)),) if self.with_index else ()
        return TensorBatches(self.train_images, labels, *index).loader(
            batch_size=self.batch_size, shuffle=True, num_workers=self.num_workers, drop_last=self.drop_last
        )

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation(self.val_images, self.val_labels)

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation(self.test_images, self.test_labels)

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.test_dataloader()

    def _evaluation(self, *tensors: Tensor) -> DataLoader[Batch]:
        return TensorBatches(*tensors).loader(batch_size=self.val_batch_size, num_workers=self.num_workers)

    def _scaled(self, source: LabelledImages, rows: Tensor) -> tuple[Tensor, Tensor]:
        # Rows first, floats second: a small subset of a large source never becomes floats as a whole.
        images = source.images[rows].float().div_(self.max_pixel)
        if self.pad_to is not None:
            before, after = (self.pad_to - images.shape[-1]) // 2, -(-(self.pad_to - images.shape[-1]) // 2)
            images = torch.nn.functional.pad(images, (before, after, before, after))
        if self.symmetric:
            images = images.mul_(2.0).sub_(1.0)
        return images, source.labels[rows].long()


def seed_of_the_run() -> int:
    """Return the seed of `seed_everything`.

    Raises:
        ValueError: There is none.
    """
    # Not torch.initial_seed(): without seed_everything it differs between the processes of a run, and so
    # would their splits. Lightning hands its seed to every process in this variable.
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is None:
        raise ValueError(
            "`seed=None` takes the seed of the run. Got a run without one: call "
            "`lightning.pytorch.seed_everything(0)` first, give `--seed_everything 0`, or set `seed`."
        )
    return int(seed)


def with_wrong_labels(
    labels: Tensor,
    fraction: float,
    num_classes: int,
    generator: torch.Generator,
    kind: Literal["symmetric", "pairwise"] = "symmetric",
) -> Tensor:
    """Return a copy of ``labels`` where ``round(fraction · n)`` random entries are of other classes.

    Args:
        labels: ``(n,)`` class numbers; so is the result.
        fraction: Share of wrong labels, in [0, 1].
        num_classes: Number of classes, at least 2 if any label is to be wrong.
        generator: Source of randomness.
        kind: ``"symmetric"``: uniform over the other classes; ``"pairwise"``: the next class, the first after the last.

    Example:
        >>> labels = torch.arange(1000) % 10
        >>> noisy = with_wrong_labels(labels, 0.4, 10, torch.Generator().manual_seed(0))
        >>> int((noisy != labels).sum())
        400
    """
    count = round(fraction * len(labels))
    rows = torch.randperm(len(labels), generator=generator)[:count]
    # A shift of 1 … C-1 modulo C reaches each other class with equal probability and never the right one.
    shift = torch.randint(1, num_classes, (count,), generator=generator) if kind == "symmetric" else 1
    noisy = labels.clone()
    noisy[rows] = (labels[rows] + shift) % num_classes
    return noisy


def long_tail(labels: Tensor, imbalance: float, num_classes: int) -> Tensor:
    """Return the positions, in order, of the images that a long tail keeps: the first ones of each class.

    n_c = n·imbalance^(−c/(C−1)), rounded but at least one, with the largest n that every class has images for.

    Args:
        labels: ``(n,)`` class numbers.
        imbalance: Images of the first class for one of the last.
        num_classes: Number C of classes.

    Example:
        >>> kept = long_tail(torch.arange(300) % 3, 100.0, 3)
        >>> (kept % 3).bincount().tolist()
        [100, 10, 1]
    """
    share = imbalance ** (-torch.arange(num_classes, dtype=torch.float64) / max(1, num_classes - 1))
    present = labels.bincount(minlength=num_classes)
    most = float((present / share).min())
    counts = (most * share).round().long().clamp_min(1).minimum(present)
    kept = [(labels == c).nonzero().flatten()[: int(counts[c])] for c in range(num_classes)]
    return torch.cat(kept).sort().values
