"""Text for language models: rows of tokens from texts that are on the machine already."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_nested.arguments import at_least, checked, fraction
from lightning_nested.datamodules.in_memory import Batch, TensorBatches, seed_of_the_run

_WORD = re.compile(r"\w+|[^\w\s]|\n")
UNKNOWN = "<unk>"
Level = Literal["words", "characters"]


@checked
class TextDataModule(LightningDataModule):
    """Rows of tokens: batches ``(inputs, targets, …)`` of shape (batch, length), where a target is the next token.

    The vocabulary is the most frequent tokens of the training rows; token 0 is ``<unk>``, all others. A subclass says
    where text comes from by ``load``.

    Args:
        level: Words with punctuation marks and line ends, or characters.
        length: Tokens of a row.
        vocabulary_size: Largest number of symbols, ``<unk>`` included: the number that a model is built for.
        batch_size: Rows of a training batch; incomplete ones are left out.
        val_batch_size: Rows of a validation or test batch; None: ``batch_size``.
        val_fraction: Share of the rows that validate.
        test_fraction: Share of the rows that test.
        train_tokens: Largest number of training tokens; None: all.
        seed: Seed of the split; None: the seed of the run.
    """

    # Set by `setup`.
    vocabulary: tuple[str, ...]
    train_rows: Tensor  # (rows, length + 1)
    val_rows: Tensor
    test_rows: Tensor

    def __init__(
        self,
        *,
        level: Level = "words",
        length: int = 32,
        vocabulary_size: int = 2000,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        train_tokens: int | None = None,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        at_least(
            1, length=length, batch_size=batch_size, val_batch_size=val_batch_size, train_tokens=train_tokens
        )
        at_least(2, vocabulary_size=vocabulary_size)
        at_least(0, seed=seed)
        fraction(val_fraction=val_fraction, test_fraction=test_fraction)
        if not val_fraction + test_fraction < 1:
            raise ValueError(
                f"val_fraction + test_fraction must be less than 1. Got {val_fraction} + {test_fraction}."
            )
        self.level, self.length, self.vocabulary_size = level, length, vocabulary_size
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.val_fraction, self.test_fraction, self.train_tokens = val_fraction, test_fraction, train_tokens
        self.seed = seed
        self._ready = False

    @abstractmethod
    def load(self) -> str:
        """Return the text."""

    @override
    def setup(self, stage: str | None = None) -> None:
        if not self._ready:
            self._build()
            self._ready = True

    def _build(self) -> None:
        rows, train, val, test = self._split(self._tokens(self.load()))
        (numbered,), self.vocabulary = self._numbered([rows], [train])
        self.train_rows, self.val_rows, self.test_rows = numbered[train], numbered[val], numbered[test]

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train_rows, batch_size=self.batch_size, shuffle=True, drop_last=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.val_rows, batch_size=self.val_batch_size)

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.test_rows, batch_size=self.val_batch_size)

    def _loader(self, rows: Tensor, *more: Tensor, **options: Any) -> DataLoader[Batch]:
        return TensorBatches(rows[:, :-1], rows[:, 1:], *more).loader(**options)

    def _tokens(self, text: str) -> list[str]:
        return list(text) if self.level == "characters" else _WORD.findall(text)

    def _split(self, tokens: Sequence[str]) -> tuple[list[list[str]], Tensor, Tensor, Tensor]:
        """Return rows of ``length`` + 1 tokens, and the positions of those that train, validate and test."""
        step = self.length + 1
        rows = [list(tokens[k : k + step]) for k in range(0, len(tokens) - step + 1, step)]
        val, test = (round(share * len(rows)) for share in (self.val_fraction, self.test_fraction))
        most = len(rows) if self.train_tokens is None else max(1, self.train_tokens // step)
        if len(rows) - val - test < 1 or (self.val_fraction > 0 and val < 1):
            raise ValueError(
                f"The text must have rows of {step} tokens to train and validate on. Got {len(tokens)} tokens; take a "
                "longer text, a smaller `length`, or other fractions."
            )
        self.seed = seed_of_the_run() if self.seed is None else self.seed
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        return rows, order[val + test :][:most], order[:val], order[val : val + test]

    def _numbered(
        self, texts: Sequence[list[list[str]]], train: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[str, ...]]:
        """Return rows of each text as numbers, and the vocabulary of all training rows."""
        counts: Counter[str] = Counter()
        for rows, chosen in zip(texts, train, strict=True):
            for k in chosen.tolist():
                counts.update(rows[k])
        # By frequency, then by name: the order of a Counter is that of its first sight.
        known = sorted(counts, key=lambda token: (-counts[token], token))[: self.vocabulary_size - 1]
        vocabulary = (UNKNOWN, *known)
        number = {token: k for k, token in enumerate(vocabulary)}
        tensors = [torch.tensor([[number.get(t, 0) for t in row] for row in rows]) for rows in texts]
        return tensors, vocabulary


@checked
class PydocTextDataModule(TextDataModule):
    """English that every CPython has: the language reference's help topics, about 300 kB, each text once.

    Args:
        options: Options of :class:`TextDataModule`.

    Example:
        >>> data = PydocTextDataModule(length=16, vocabulary_size=500)
        >>> data.setup()
        >>> len(data.vocabulary), data.vocabulary[0]
        (500, '<unk>')
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    @override
    def load(self) -> str:
        from lightning_nested.datamodules.text_sources import pydoc_topics

        return pydoc_topics(10**9)


@checked
class PennTreebankDataModule(TextDataModule):
    """Penn Treebank's words, or any corpus of three files, read in order by parallel streams.

    ``folder`` has ``ptb.train.txt``, ``ptb.valid.txt`` and ``ptb.test.txt`` (Mikolov's preprocessing), or
    ``train.txt``, ``valid.txt`` and ``test.txt``: words between spaces; a line's end becomes ``<eos>``. The text is cut
    into ``batch_size`` streams; row k of a batch goes on where row k of the batch before it ended, so that a
    recurrent state can be carried over.

    Args:
        folder: Folder of the three files.
        length: Tokens of a row: steps of backpropagation through time.
        batch_size: Streams of the training text.
        vocabulary_size: See :class:`TextDataModule`.
        options: Options of :class:`TextDataModule`.

    Raises:
        FileNotFoundError: A file is missing.
    """

    def __init__(
        self,
        folder: str = "data/ptb",
        *,
        length: int = 70,
        batch_size: int = 40,
        vocabulary_size: int = 10_000,
        **options: Any,
    ) -> None:
        super().__init__(length=length, batch_size=batch_size, vocabulary_size=vocabulary_size, **options)
        self.folder = folder

    @override
    def load(self) -> str:
        return self._read("train")

    def _read(self, split: str) -> str:
        for name in (f"ptb.{split}.txt", f"{split}.txt"):
            path = Path(self.folder) / name
            if path.is_file():
                return path.read_text(encoding="utf-8")
        raise FileNotFoundError(
            f"`folder` must have ptb.{split}.txt or {split}.txt. Got {self.folder!r} without them: unpack the simple "
            "examples of Mikolov's RNNLM toolkit, or set `folder` to any text in three such files."
        )

    @override
    def _tokens(self, text: str) -> list[str]:
        text = text if self.level == "characters" else text.replace("\n", " <eos> ")
        return list(text) if self.level == "characters" else text.split()

    @override
    def _build(self) -> None:
        most = {"train": self.train_tokens}
        tokens = {
            split: self._tokens(self._read(split))[: most.get(split)] for split in ("train", "valid", "test")
        }
        streams = {
            split: self._streams(found, self.batch_size if split == "train" else self.val_batch_size)
            for split, found in tokens.items()
        }
        chosen = [
            torch.arange(len(rows)) if split == "train" else torch.arange(0)
            for split, rows in streams.items()
        ]
        numbered, self.vocabulary = self._numbered(list(streams.values()), chosen)
        self.train_rows, self.val_rows, self.test_rows = numbered

    def _streams(self, tokens: Sequence[str], streams: int) -> list[list[str]]:
        each = len(tokens) // streams
        starts = range(0, each - self.length, self.length)
        if not starts:
            raise ValueError(
                f"Each of {streams} streams must have more than `length` = {self.length} tokens. Got {each}."
            )
        # Batch by batch: one row of each stream.
        return [
            list(tokens[s * each + k : s * each + k + self.length + 1])
            for k in starts
            for s in range(streams)
        ]

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train_rows, batch_size=self.batch_size)


def missing_reasons(skipped: Mapping[str, str]) -> str:
    """Return what was skipped and why, for a message."""
    return "; ".join(f"{name} ({reason})" for name, reason in skipped.items())
