"""A mixture of named sources of text, each read where it lies, for one target."""

from __future__ import annotations

import ast
import gzip
import subprocess
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.datamodules.in_memory import Batch, TensorBatches
from lightning_nested.datamodules.text import TextDataModule, missing_reasons
from lightning_nested.hyperparameters import GroupWeights


class _Reader(Protocol):
    def __call__(self, limit: int) -> str: ...


def _joined(texts: Iterable[str], limit: int) -> str:
    """Return texts one after the other, up to so many characters."""
    parts, size = [], 0
    for text in texts:
        parts.append(text)
        size += len(text) + 1
        if size >= limit:
            break
    return "\n".join(parts)[:limit]


def _read(path: Path) -> str:
    opened = gzip.open if path.suffix in (".gz", ".dz") else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        return str(file.read())


def _files(paths: Iterable[Path], limit: int) -> str:
    return _joined(map(_read, sorted(path for path in paths if path.is_file())), limit)


def _library() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def pydoc_topics(limit: int) -> str:
    """Return CPython's help topics, each text once."""
    from pydoc_data.topics import topics

    return _joined(dict.fromkeys(topics.values()), limit)


def _docstrings(limit: int) -> str:
    def found() -> Iterable[str]:
        for path in _library():
            tree = ast.parse(_read(path))
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            yield from filter(
                None, (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
            )

    return _joined(found(), limit)


def _dictionary(limit: int) -> str:
    path = Path("/usr/share/dictd/gcide.dict.dz")
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        return file.read(limit)


def _bible(limit: int) -> str:
    found = subprocess.run(["bible", "-f", "Ge1:1-Re22:21"], capture_output=True, text=True, check=True)
    # A line is a verse, after its place.
    return _joined((line.partition(" ")[2] for line in found.stdout.splitlines()), limit)


SOURCES: dict[str, _Reader] = {
    "pydoc": pydoc_topics,
    "library": lambda limit: _files(_library(), limit),
    "docstrings": _docstrings,
    "licenses": lambda limit: _files(Path("/usr/share/common-licenses").glob("*"), limit),
    "fortunes": lambda limit: _files(
        (p for p in Path("/usr/share/games/fortunes").glob("*") if not p.suffix), limit
    ),
    "gcide": _dictionary,
    "bible": _bible,
    "reference": lambda limit: _files(
        [Path("/usr/share/debian-reference/debian-reference.en.txt.gz")], limit
    ),
}


@checked
class TextSourcesDataModule(TextDataModule):
    """Several sources of text to train on, and held-out text of one of them to do well on.

    Known sources: ``pydoc`` (CPython's help topics), ``library`` (its standard library's code), ``docstrings`` (of the
    same), ``licenses`` (``/usr/share/common-licenses``), and of Debian's packages ``fortunes``, ``gcide``
    (``dict-gcide``), ``bible`` (``bible-kjv``) and ``reference`` (``debian-reference-en``). Any other name is the path
    of a file or a folder of text files. A source that is not on the machine
    is skipped, and said why; :attr:`names` are those that remain.

    Training batches are ``(inputs, targets, source)``, where ``source`` (batch,) numbers :attr:`names`; validation and
    test batches ``(inputs, targets)`` are of the target. With ``mixture="tuned"`` sources are drawn by the
    :class:`GroupWeights` of those names that a callback of the Trainer tunes: one of weight zero costs nothing.

    Args:
        sources: Names or paths.
        target: Source whose held-out rows validate and test.
        target_tokens: Training tokens of the target; None: as ``train_tokens``. 0: it is no source to train on.
        mixture: ``"proportional"`` to size, ``"uniform"`` or ``"tuned"``.
        max_characters: Characters read of each source.
        epoch_rows: Rows of an epoch; None: all training rows.
        options: Options of :class:`TextDataModule`; ``train_tokens`` is of each source.

    Attributes:
        names: Names of the sources that are there, the target among them if it is trained on.
        skipped: Reason by name of those that are not.

    Raises:
        FileNotFoundError: The target is not there, or no source is.
    """

    names: tuple[str, ...]
    source: Tensor  # (training rows,)

    def __init__(
        self,
        sources: Sequence[str] = ("pydoc", "library", "docstrings", "licenses", "fortunes", "gcide"),
        target: str = "pydoc",
        *,
        target_tokens: int | None = None,
        mixture: Literal["proportional", "uniform", "tuned"] = "proportional",
        max_characters: int = 1_000_000,
        epoch_rows: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        at_least(1, max_characters=max_characters, epoch_rows=epoch_rows)
        at_least(0, target_tokens=target_tokens)
        if target not in sources or len(set(sources)) != len(sources):
            raise ValueError(
                f"sources must be different names, with target={target!r} among them. Got {list(sources)}."
            )
        self.sources, self.target, self.target_tokens = tuple(sources), target, target_tokens
        self.mixture, self.max_characters, self.epoch_rows = mixture, max_characters, epoch_rows
        self.skipped: dict[str, str] = {}

    @override
    def load(self) -> str:
        return self._load(self.target)

    def _load(self, name: str) -> str:
        if name in SOURCES:
            return SOURCES[name](self.max_characters)
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {name!r}")
        return _files(path.rglob("*") if path.is_dir() else [path], self.max_characters)

    @override
    def _build(self) -> None:
        texts = self._found()
        rows, train = [], []
        for name, text in texts.items():
            of_target = name == self.target
            split = self._split(self._tokens(text))
            rows.append(split[0])
            chosen = split[1]
            if of_target:
                val, test = split[2], split[3]
                if self.target_tokens is not None:
                    chosen = chosen[: self.target_tokens // (self.length + 1)]
            train.append(chosen)
        numbered, self.vocabulary = self._numbered(rows, train)
        kept = [(name, n[c]) for name, n, c in zip(texts, numbered, train, strict=True) if len(c)]
        self.names = tuple(name for name, _ in kept)
        self.train_rows = torch.cat([n for _, n in kept])
        self.source = torch.cat([torch.full((len(n),), k) for k, (_, n) in enumerate(kept)])
        held_out = numbered[list(texts).index(self.target)]
        self.val_rows, self.test_rows = held_out[val], held_out[test]

    def _found(self) -> dict[str, str]:
        texts = {name: self._text_or_reason(name) for name in self.sources}
        found = {name: text for name, text in texts.items() if name not in self.skipped}
        if self.target not in found:
            raise FileNotFoundError(
                f"target={self.target!r} must be there. Got none: {self.skipped[self.target]}."
            )
        if self.skipped:
            rank_zero_info(f"TextSourcesDataModule skips {missing_reasons(self.skipped)}.")
        return found

    def _text_or_reason(self, name: str) -> str:
        try:
            text = self._load(name)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            self.skipped[name] = str(error)
            return ""
        if not text.strip():
            self.skipped[name] = "it has no files here"
        return text

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        data = TensorBatches(self.train_rows[:, :-1], self.train_rows[:, 1:], self.source)
        sampler = self._weights().sampler(self.source, self.epoch_rows)
        return data.loader(batch_size=self.batch_size, sampler=sampler, drop_last=True)

    def _weights(self) -> GroupWeights:
        if self.mixture == "tuned":
            return _tuned(self.trainer, self.names, self.skipped)
        sizes = self.source.bincount().tolist()
        return GroupWeights(self.names, init=sizes if self.mixture == "proportional" else None)


def _tuned(trainer: Any, names: Sequence[str], skipped: Mapping[str, str]) -> GroupWeights:
    """Return the weights of these groups that a callback tunes."""
    for callback in getattr(trainer, "callbacks", []):
        for hyperparameter in getattr(getattr(callback, "outer", None), "hyperparameters", ()):
            if isinstance(hyperparameter, GroupWeights) and set(hyperparameter.names) == set(names):
                if hyperparameter.names != tuple(names):
                    raise ValueError(
                        f"names of GroupWeights must be in the order of the sources, {list(names)}. "
                        f"Got {list(hyperparameter.names)}."
                    )
                return hyperparameter
            others = set(getattr(hyperparameter, "names", ())) - set(names)
            if isinstance(hyperparameter, GroupWeights) and others and others <= set(skipped):
                raise ValueError(
                    f"names of GroupWeights must be sources that are on this machine, {list(names)}. Got skipped ones: "
                    f"{missing_reasons(skipped)}; install them, or leave their names out."
                )
    raise ValueError(
        f"mixture='tuned' needs a callback of the Trainer that tunes GroupWeights({list(names)}). Got none; add "
        "HypergradientCallback(GroupWeights([...])), or set mixture='uniform'."
    )
