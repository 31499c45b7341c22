"""The shipped distillation: a short run from the command line, and the whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_nested.cli.main import main
from tests.command import run_command

COMMAND = ("fit", "--config", "distill_digits", "--trainer.enable_progress_bar=false")


def results(folder: Path, printed: str) -> dict[str, Any]:
    assert "test accuracy, median" in printed
    (path,) = folder.glob("runs/distill_digits/version_*/results.json")
    assert (path.parent / "distill_digits.png").stat().st_size > 20_000
    return dict(json.loads(path.read_text()))


@pytest.mark.usefixtures("own_folder")
def test_a_short_run_draws_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--trainer.max_epochs=4", "--trainer.check_val_every_n_epoch=2", "--model.unrolled_steps=3"]
    main([*COMMAND, *short, "--model.restart_every=2"])
    found = results(tmp_path, capsys.readouterr().out)
    assert found["images"] == 10
    assert found["steps"] == 16
    assert [entry[0] for entry in found["validation"]] == [8, 16]
    assert all(len(entry) == 3 and entry[2] is not None for entry in found["validation"])


@pytest.mark.slow
def test_ten_images_teach_a_fresh_network(tmp_path: Path) -> None:
    found = results(tmp_path, run_command(*COMMAND, folder=tmp_path))
    assert len(found["test_accuracy"]) == 5
    assert found["test_accuracy_median"] >= 0.86
