"""Tables: scikit-learn's own or a CSV file, with columns of noise on request."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
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
_FEW = 20  # so many different values are classes, if they are whole numbers, and may be words of a column


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
        classes: Whether the CSV's target is a class; False for a count or a price in whole numbers. None: words are
            classes, and so are whole numbers of at most 20 different values.
        train_size: Number of training rows.
        val_size: Number of validation rows; the other rows are the test set.
        noise_columns: Columns of noise.
        batch_size: Rows of a training batch; validation and test batches are whole.
        with_index: Training batches are ``(inputs, target, index)``; needed by one weight per example.
        seed: Seed of the split and of the noise; None: the seed of the run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The table is too short, or has no such column; a CSV cell is empty, NaN or infinite; a CSV column
            has nearly as many words as rows, or words among numbers.

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
        classes: bool | None = None,
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
        if source in _SETS and classes is not None:
            raise ValueError(
                f"classes must be None for {source!r}, whose target is known. Got {classes}; leave it out."
            )
        self.source, self.target, self.classes = source, target, classes
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
        table = _read(Path(self.source), self.target)
        columns, parts = [], []
        for name in table.inputs:
            found = table.numbers(name)
            if found is not None:
                columns.append(name)
                parts.append(found)
                continue
            cells = table.cells[name]
            for kind in sorted(set(cells)):
                columns.append(f"{name}={kind}")
                parts.append(torch.tensor([float(cell == kind) for cell in cells]))
        numbers, words = table.numbers(table.target), table.cells[table.target]
        kinds = sorted(set(words))
        if numbers is None and self.classes is False:
            raise ValueError(
                f"classes=False needs a target of numbers. Got words in column {table.target!r} of {self.source}, such "
                f"as {kinds[0]!r}; leave classes out."
            )
        few = numbers is None or (len(kinds) <= _FEW and bool((numbers == numbers.round()).all()))
        if numbers is not None and not (few if self.classes is None else self.classes):
            return columns, torch.stack(parts, dim=1), numbers
        return columns, torch.stack(parts, dim=1), torch.tensor([kinds.index(word) for word in words])


@dataclass(frozen=True)
class _Table:
    """Cells of a CSV file by column, and the lines of the file that its rows stand in."""

    name: str
    target: str
    cells: dict[str, list[str]]
    lines: list[int]

    @property
    def inputs(self) -> list[str]:
        return [name for name in self.cells if name != self.target]

    def numbers(self, column: str) -> Tensor | None:
        """Return a column of numbers, or None for one of words; refuse what is neither."""
        cells = self.cells[column]
        values = [_number(cell) for cell in cells]
        found = torch.tensor([math.nan if value is None else value for value in values])
        words = [row for row, value in enumerate(values) if value is None]
        gaps = [row for row, cell in enumerate(cells) if cell.strip().lower() in ("", "nan")]
        if not words:
            gaps = (~found.isfinite()).nonzero().flatten().tolist()
        if gaps:
            raise ValueError(
                f"Every cell must have a value, and numbers must be finite. Got {cells[gaps[0]]!r} in "
                f"{self._place(gaps[0], column)}; fill it (the column has {len(gaps)} such cells), or leave its row or "
                "the column out."
            )
        if not words:
            return found
        kinds = len(set(cells))
        if kinds > _FEW and (2 * kinds > len(cells) or 2 * len(words) < len(cells)):
            raise ValueError(
                "A column must hold numbers, or words that repeat: each word becomes a column. Got "
                f"{kinds} different values in {len(cells)} rows, and {cells[words[0]]!r}, which is no number, in "
                f"{self._place(words[0], column)}; write numbers with a decimal point, or leave the column out."
            )
        return None

    def _place(self, row: int, column: str) -> str:
        return f"line {self.lines[row]}, column {column!r} of {self.name}"


def _read(path: Path, target: str | None) -> _Table:
    if not path.is_file():
        raise FileNotFoundError(f"source must be a file. Got {str(path)!r}, and there is none.")
    # Excel begins a file in UTF-8 with a mark, which would belong to the first name.
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        found = [(reader.line_num, row) for row in reader if any(map(str.strip, row)) or len(row) > 1]
    names, rows = found[0][1] if found else [], found[1:]
    target = names[-1] if target is None and names else target
    if target not in names or not rows:
        raise ValueError(f"target must be a column of {path.name}: {', '.join(names)}. Got {target!r}.")
    if len(set(names)) < len(names) or len(names) < 2:
        raise ValueError(
            f"The first line of {path.name} must name two columns or more, separated by commas, each differently. Got "
            f"{', '.join(names)}."
        )
    for line, row in rows:
        if len(row) != len(names):
            raise ValueError(
                f"Every row must have a cell for each of {len(names)} columns. Got {len(row)} in line {line} of "
                f"{path.name}; a comma inside a cell needs quotes around the cell."
            )
    cells = {name: [row[k] for _, row in rows] for k, name in enumerate(names)}
    return _Table(path.name, target, cells, [line for line, _ in rows])


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _standardized(values: Tensor, rows: Tensor) -> Tensor:
    """Return columns with mean 0 and standard deviation 1 over ``rows``; constant ones become 0."""
    chosen = values[rows]
    result: Tensor = (values - chosen.mean(0)) / chosen.std(0).clamp_min(1e-6)
    return result
