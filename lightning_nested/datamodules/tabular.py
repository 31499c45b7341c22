"""Tables: scikit-learn's own or a CSV file, with columns of noise on request."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.datamodules.in_memory import Batch, TensorBatches, seed_of_the_run
from lightning_nested.extras import require_package

_SETS = {"breast_cancer": False, "diabetes": True, "wine": False}  # whether the target is a number


@checked
class TabularDataModule(LightningDataModule):
    """A table of numbers and a target: one of scikit-learn's, or a CSV file with a header.

    Columns are standardized by the training rows; a CSV column that holds words becomes a column for each of its words.
    ``noise_columns`` columns of standard normal numbers are added behind them, which say nothing of the target.
    Batches are ``(inputs, target)``, of shapes (batch, ``num_features``) and, for classes, (batch,); a target of
    numbers is standardized too, of shape (batch, 1).

    Args:
        source: ``"breast_cancer"``, ``"diabetes"`` or ``"wine"`` of scikit-learn, or the path of a CSV file.
        target: Name of the CSV's target column; None: its last one.
        train_size: Number of training rows.
        val_size: Number of validation rows; the other rows are the test set.
        noise_columns: Columns of noise.
        batch_size: Rows of a training batch; validation and test batches are whole.
        with_index: Training batches are ``(inputs, target, index)``; needed by one weight per example.
        seed: Seed of the split and of the noise; None: the seed of the run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The table is too short, or has no such column.

    Example:
        >>> data = TabularDataModule("wine", train_size=80, val_size=40, noise_columns=5)
        >>> data.setup()
        >>> data.num_features, data.num_classes, int(data.noise.sum())
        (18, 3, 5)
    """

    # Set by `setup`.
    columns: tuple[str, ...]  # names of the inputs
    noise: Tensor  # (num_features,) boolean, True for columns of noise
    num_features: int
    num_classes: int | None  # None for a target of numbers
    train_inputs: Tensor
    train_target: Tensor
    val_inputs: Tensor
    val_target: Tensor
    test_inputs: Tensor
    test_target: Tensor

    def __init__(
        self,
        source: str = "breast_cancer",
        *,
        target: str | None = None,
        train_size: int = 220,
        val_size: int = 110,
        noise_columns: int = 0,
        batch_size: int = 32,
        with_index: bool = False,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        at_least(1, train_size=train_size, val_size=val_size, batch_size=batch_size)
        at_least(0, noise_columns=noise_columns, seed=seed)
        if source not in _SETS and not source.lower().endswith(".csv"):
            raise ValueError(f"source must be one of {sorted(_SETS)} or a file.csv. Got {source!r}.")
        self.source, self.target = source, target
        self.train_size, self.val_size, self.noise_columns = train_size, val_size, noise_columns
        self.batch_size, self.with_index, self.seed = batch_size, with_index, seed
        self._ready = False

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._ready:
            return
        columns, inputs, target = self._scikit_learn() if self.source in _SETS else self._csv()
        if self.train_size + self.val_size >= len(target):
            raise ValueError(
                f"`train_size + val_size` must be less than the {len(target)} rows of {self.source}. "
                f"Got {self.train_size} + {self.val_size}. Ask for fewer."
            )
        self.seed = seed_of_the_run() if self.seed is None else self.seed
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(target), generator=generator)
        rows = order.tensor_split([self.train_size, self.train_size + self.val_size])
        inputs = _standardized(inputs, rows[0])
        inputs = torch.cat([inputs, torch.randn(len(target), self.noise_columns, generator=generator)], dim=1)
        if target.is_floating_point():
            self.num_classes, target = None, _standardized(target.unsqueeze(1), rows[0])
        else:
            self.num_classes = int(target.max()) + 1
        self.columns = (*columns, *(f"noise {k}" for k in range(self.noise_columns)))
        self.num_features = len(self.columns)
        self.noise = torch.arange(self.num_features) >= len(columns)
        self.train_inputs, self.val_inputs, self.test_inputs = (inputs[r] for r in rows)
        self.train_target, self.val_target, self.test_target = (target[r] for r in rows)
        self._ready = True

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        index = (torch.arange(self.train_size),) if self.with_index else ()
        data = TensorBatches(self.train_inputs, self.train_target, *index)
        return data.loader(batch_size=self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        return TensorBatches(self.val_inputs, self.val_target).loader(batch_size=len(self.val_target))

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        return TensorBatches(self.test_inputs, self.test_target).loader(batch_size=len(self.test_target))

    def _scikit_learn(self) -> tuple[Sequence[str], Tensor, Tensor]:
        require_package("sklearn")
        from sklearn import datasets  # here, because it costs most of a second

        found = getattr(datasets, f"load_{self.source}")()
        target = torch.from_numpy(found.target)
        target = target.float() if _SETS[self.source] else target.long()
        return list(found.feature_names), torch.from_numpy(found.data).float(), target

    def _csv(self) -> tuple[Sequence[str], Tensor, Tensor]:
        path = Path(self.source)
        if not path.is_file():
            raise FileNotFoundError(f"source must be a file. Got {self.source!r}, and there is none.")
        with path.open(newline="", encoding="utf-8") as file:
            names, *rows = list(csv.reader(file))
        target = self.target if self.target is not None else names[-1]
        if target not in names or not rows:
            raise ValueError(f"target must be a column of {path.name}: {', '.join(names)}. Got {target!r}.")
        values = {name: [row[i] for row in rows] for i, name in enumerate(names)}
        words = values.pop(target)
        numbers = _numbers(words)
        classes = sorted(set(words))
        # Few whole numbers are classes, as words are.
        counted = numbers is None or (len(classes) <= 20 and bool((numbers == numbers.round()).all()))
        goal = torch.tensor([classes.index(w) for w in words]) if counted or numbers is None else numbers
        columns, parts = [], []
        for name, column in values.items():
            found = _numbers(column)
            kinds = sorted(set(column)) if found is None else []
            columns += [name] if found is not None else [f"{name}={kind}" for kind in kinds]
            parts += (
                [found]
                if found is not None
                else [torch.tensor([float(v == k) for v in column]) for k in kinds]
            )
        return columns, torch.stack(parts, dim=1), goal


def _numbers(column: Sequence[str]) -> Tensor | None:
    try:
        return torch.tensor([float(value) for value in column])
    except ValueError:
        return None


def _standardized(values: Tensor, rows: Tensor) -> Tensor:
    """Return columns with mean 0 and standard deviation 1 over ``rows``; constant ones become 0."""
    chosen = values[rows]
    result: Tensor = (values - chosen.mean(0)) / chosen.std(0).clamp_min(1e-6)
    return result
