"""The shipped augmentation network: a short run from the command line, and the whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_nested.cli.main import main
from tests.command import run_command

COMMAND = ("fit", "--config", "augment_fashion", "--trainer.enable_progress_bar=false")
pytestmark = pytest.mark.usefixtures("fashion_mnist")


def results(folder: Path, printed: str) -> dict[str, Any]:
    assert "spread over random draws" in printed
    (path,) = folder.glob("runs/augment_fashion/version_*/results.json")
    assert (path.parent / "augment_fashion.png").stat().st_size > 20_000
    return dict(json.loads(path.read_text()))


@pytest.mark.usefixtures("own_folder")
def test_a_short_run_draws_augmented_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data.train_size=40", "--data.val_size=20", "--data.batch_size=20", "--data.val_batch_size=20"]
    small += [
        "--trainer.callbacks.HypergradientCallback.every_n_steps=1",
        "--model.augmentation.init_args.width=2",
    ]
    main([*COMMAND, "--trainer.max_epochs=2", *small])
    found = results(tmp_path, capsys.readouterr().out)
    assert found["steps"] == 4
    assert found["change"] > 0
    assert found["spread"] > 0


@pytest.mark.slow
def test_the_whole_run_trains_a_classifier(tmp_path: Path) -> None:
    found = results(tmp_path, run_command(*COMMAND, folder=tmp_path))
    assert found["val_accuracy"] > 0.7
    assert 0.005 < found["change"] < 0.5
