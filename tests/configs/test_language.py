"""The shipped language models: short runs from the command line, and the whole one on words of the help topics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_nested.cli.main import main
from tests.command import run_command


def results(folder: Path, name: str) -> dict[str, Any]:
    (path,) = folder.glob(f"runs/{name}/version_*/results.json")
    assert (path.parent / f"{name}.png").stat().st_size > 20_000
    return dict(json.loads(path.read_text()))


@pytest.mark.usefixtures("own_folder")
def test_a_short_run_on_the_help_topics(tmp_path: Path) -> None:
    options = [
        "--trainer.max_epochs=2",
        "--trainer.limit_val_batches=2",
        "--trainer.enable_progress_bar=false",
    ]
    options += ["--data.train_tokens=3000", "--model.network_options.width=8"]
    main(["fit", "--config", "lstm_pydoc", *options])
    found = results(tmp_path, "lstm_pydoc")
    assert found["outer_steps"] >= 1
    assert {name: len(v) if isinstance(v, list) else 1 for name, v in found["values"].items()} == {
        "dropout": 3, "drop_connect": 1, "alpha": 1, "beta": 1,
    }  # fmt: skip
    assert found["metrics"]["val_perplexity"] < 1000
    (path,) = tmp_path.rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["hyper_parameters"]["network"] == "lstm"


@pytest.mark.usefixtures("own_folder")
def test_the_full_setting_of_the_penn_treebank_runs_on_a_folder_of_its_format(tmp_path: Path) -> None:
    """Mikolov's files: a sentence a line, words and spaces around them."""
    (tmp_path / "data/ptb").mkdir(parents=True)
    for split, lines in (("train", 400), ("valid", 330), ("test", 330)):
        sentences = (
            " ".join(["", *(f"word{(k * k + i * i) % 97}" for i in range(k % 20 + 1)), "<unk>", "N", "\n"])
            for k in range(lines)
        )
        (tmp_path / f"data/ptb/ptb.{split}.txt").write_text("".join(sentences), encoding="utf-8")
    options = ["--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    options += ["--model.network_options.width=12", "--data.length=9", "--num_threads=1"]
    main(["fit", "--config", "lstm_ptb", *options])
    found = results(tmp_path, "lstm_ptb")
    assert found["outer_steps"] >= 1
    assert len(found["values"]["dropout"]) == 4
    assert found["skipped_outer_steps"] == 0
    assert found["metrics"]["val_perplexity"] < 10_000


@pytest.mark.slow
def test_tuned_rates_on_the_help_topics(tmp_path: Path) -> None:
    run_command("fit", "--config", "lstm_pydoc", "--trainer.enable_progress_bar=false", folder=tmp_path)
    assert results(tmp_path, "lstm_pydoc")["metrics"]["val_perplexity"] < 34


@pytest.mark.usefixtures("own_folder")
def test_a_short_run_on_a_mixture(tmp_path: Path) -> None:
    """On two sources that every CPython has."""
    groups = {"class_path": "GroupWeights", "init_args": {"names": ["docstrings", "library"]}}
    options = [
        "--trainer.max_epochs=2",
        "--trainer.limit_val_batches=2",
        "--trainer.enable_progress_bar=false",
    ]
    options += [
        "--data.sources=[docstrings,library,pydoc]",
        "--data.max_characters=60000",
        "--data.epoch_rows=640",
    ]
    options += [f"--trainer.callbacks.HypergradientCallback.hyperparameters={json.dumps([groups])}"]
    main(["fit", "--config", "mixture_text", *options, "--model.network_options.width=8"])
    found = results(tmp_path, "mixture_text")
    assert set(found["final"]) == {"docstrings", "library"}
    assert found["steps"][-1] == 40
    assert len(found["val_perplexity"]) == 2
