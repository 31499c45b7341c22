from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_nested.datamodules import PennTreebankDataModule, PydocTextDataModule, TextSourcesDataModule
from lightning_nested.datamodules.text import UNKNOWN
from lightning_nested.datamodules.text_sources import SOURCES
from lightning_nested.hyperparameters import GroupWeights


def ready(data: Any) -> Any:
    data.setup()
    return data


def test_pydoc_s_rows_are_its_text_each_once_and_targets_are_the_next_token() -> None:
    data = ready(PydocTextDataModule(length=16, vocabulary_size=10_000, level="characters"))
    rows = torch.cat([data.train_rows, data.val_rows, data.test_rows])
    text = data.load()
    written = sorted("".join(data.vocabulary[k] for k in row) for row in rows.tolist())
    expected = sorted(text[k : k + 17] for k in range(0, len(text) - 16, 17))
    # Symbols that no training row has are unknown.
    assert sum(a != b for a, b in zip(written, expected, strict=True)) < 10
    inputs, targets = next(iter(data.train_dataloader()))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert len(data.val_rows) == round(0.1 * len(rows))


def test_the_vocabulary_is_the_most_frequent_words_of_the_training_rows() -> None:
    data = ready(PydocTextDataModule(length=10, vocabulary_size=50, train_tokens=22_000))
    assert len(data.vocabulary) == 50
    assert data.vocabulary[0] == UNKNOWN
    assert len(data.train_rows) == 2_000
    counts = data.train_rows.flatten().bincount(minlength=50)
    assert bool((counts[1:].diff() <= 0).all())
    assert int(data.val_rows.max()) < 50


def test_penn_treebank_is_read_in_streams_that_go_on_from_batch_to_batch(tmp_path: Path) -> None:
    for split, size in (("train", 100), ("valid", 30), ("test", 25)):
        text = " ".join(f"w{k}" for k in range(size)) + "\n"
        (tmp_path / f"ptb.{split}.txt").write_text(text, encoding="utf-8")
    data = ready(PennTreebankDataModule(str(tmp_path), length=6, batch_size=4, val_batch_size=2))
    batches = list(data.train_dataloader())
    # 101 tokens in four streams of 25: four rows of six steps in each.
    assert len(batches) == 4
    for (before, wanted), (after, _) in pairwise(batches):
        assert torch.equal(wanted[:, -1], after[:, 0])
        assert before.shape == (4, 6)
    first = [data.vocabulary[k] for k in batches[0][0][1].tolist()]
    assert first == [f"w{k}" for k in range(25, 31)]
    assert len(list(data.val_dataloader())) == 2
    with pytest.raises(FileNotFoundError, match=r"ptb.train.txt or train.txt. Got 'nowhere'"):
        PennTreebankDataModule("nowhere").setup()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("near", "far")):
        (tmp_path / f"{name}.txt").write_text(
            " ".join(f"{name}{i % (5 + k)}" for i in range(1000)), encoding="utf-8"
        )
    return tmp_path


OPTIONS: dict[str, Any] = {"length": 9, "batch_size": 8, "vocabulary_size": 30}


@pytest.mark.usefixtures("folder")
def test_sources_that_are_not_there_are_skipped_with_the_reason() -> None:
    data = ready(TextSourcesDataModule(["near.txt", "gone.txt", "far.txt"], "near.txt", **OPTIONS))
    assert data.names == ("near.txt", "far.txt")
    assert data.skipped == {"gone.txt": "no file or folder 'gone.txt'"}
    assert data.source.bincount().tolist() == [80, 80]
    assert all(data.vocabulary[k].startswith("near") for k in data.val_rows.unique().tolist())
    inputs, targets, source = next(iter(data.train_dataloader()))
    assert (inputs.shape, targets.shape, source.shape) == ((8, 9), (8, 9), (8,))
    with pytest.raises(FileNotFoundError, match=r"target='gone.txt' must be there. Got none: no file"):
        TextSourcesDataModule(["near.txt", "gone.txt"], "gone.txt", **OPTIONS).setup()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("mixture", "share"), [("proportional", 0.2), ("uniform", 0.5), ("tuned", 0.9)])
def test_sources_are_drawn_as_the_mixture_says(mixture: Any, share: float) -> None:
    data = ready(
        TextSourcesDataModule(
            ["near.txt", "far.txt"], "near.txt", mixture=mixture, target_tokens=200, **OPTIONS
        )
    )
    weights = GroupWeights(["near.txt", "far.txt"], init=[9, 1])
    data.trainer = SimpleNamespace(
        callbacks=[SimpleNamespace(outer=SimpleNamespace(hyperparameters=[weights]))]
    )
    drawn = torch.cat([batch[2] for batch in data.train_dataloader()])
    assert float((drawn == 0).float().mean()) == pytest.approx(share, abs=0.03)
    assert weights.drives_sampler == (mixture == "tuned")


@pytest.mark.usefixtures("folder")
def test_tuned_weights_of_other_names_are_refused() -> None:
    data = ready(TextSourcesDataModule(["near.txt", "far.txt"], "near.txt", mixture="tuned", **OPTIONS))
    for names, message in (
        (["near.txt", "x"], "needs a callback"),
        (["far.txt", "near.txt"], "in the order"),
    ):
        outer = SimpleNamespace(hyperparameters=[GroupWeights(names)])
        data.trainer = SimpleNamespace(callbacks=[SimpleNamespace(outer=outer)])
        with pytest.raises(ValueError, match=message):
            data.train_dataloader()


@pytest.mark.usefixtures("folder")
def test_tuned_weights_of_a_source_that_is_not_there_are_refused_with_the_reason() -> None:
    sources = ["near.txt", "gone.txt", "far.txt"]
    data = ready(TextSourcesDataModule(sources, "near.txt", mixture="tuned", **OPTIONS))
    outer = SimpleNamespace(hyperparameters=[GroupWeights(sources)])
    data.trainer = SimpleNamespace(callbacks=[SimpleNamespace(outer=outer)])
    with pytest.raises(
        ValueError, match=r"skipped ones: gone.txt \(no file or folder 'gone.txt'\); install them"
    ):
        data.train_dataloader()


def test_every_known_source_is_text_or_says_why_not() -> None:
    for name, read in SOURCES.items():
        try:
            text = read(5_000)
        except (OSError, ImportError):
            assert name in ("gcide", "bible", "reference")
            continue
        assert len(text) <= 5_000
        assert name in ("fortunes", "licenses") or text.count(" ") > 100


def test_known_sources_are_read_or_skipped_and_a_target_of_no_tokens_is_only_evaluated() -> None:
    data = ready(TextSourcesDataModule(target_tokens=0, max_characters=30_000, train_tokens=3_000, **OPTIONS))
    assert {*data.names, *data.skipped, "pydoc"} == {*data.sources}
    assert {"library", "docstrings"} <= set(data.names)
    assert "pydoc" not in data.names
    assert len(data.val_rows) > 10
