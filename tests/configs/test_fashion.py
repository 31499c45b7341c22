"""The shipped runs on Fashion-MNIST: short ones from the command line, and the whole ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_nested.cli.main import main
from tests.command import run_command

pytestmark = pytest.mark.usefixtures("fashion_mnist")


def command(name: str) -> tuple[str, ...]:
    return ("fit", "--config", name, "--trainer.enable_progress_bar=false")


def results(folder: Path, name: str) -> dict[str, Any]:
    (path,) = folder.glob(f"runs/{name}/version_*/results.json")
    assert (path.parent / f"{name}.png").stat().st_size > 20_000
    return dict(json.loads(path.read_text()))


@pytest.mark.usefixtures("own_folder")
def test_a_short_distillation(tmp_path: Path) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.val_check_interval=2", "--model.unrolled_steps=2"]
    small = ["--data.train_size=2000", "--data.val_size=100", "--trainer.limit_test_batches=1"]
    main([*command("distill_fashion"), *short, *small])
    found = results(tmp_path, "distill_fashion")
    assert found["images"] == 10
    assert found["steps"] == 4
    assert [entry[0] for entry in found["validation"]] == [2, 4]


@pytest.mark.slow
def test_ten_images_of_clothes_teach_a_fresh_network(tmp_path: Path) -> None:
    run_command(*command("distill_fashion"), folder=tmp_path)
    assert results(tmp_path, "distill_fashion")["test_accuracy_median"] >= 0.65


@pytest.mark.usefixtures("own_folder")
def test_a_short_run_tunes_a_decay_for_each_weight(tmp_path: Path) -> None:
    main([*command("overfit"), "--trainer.max_epochs=60", "--trainer.check_val_every_n_epoch=60"])
    found = results(tmp_path, "overfit")
    assert found["outer_steps"] == 6
    assert found["skipped_outer_steps"] == 0
    # Adam of rate 0.1 moves each decay by its own gradient.
    start, end = found["start"]["weight_decay"], found["end"]["weight_decay"]
    assert start == pytest.approx(1e-3)
    assert end != pytest.approx(start)


@pytest.mark.slow
def test_fifty_validation_images_are_fitted(tmp_path: Path) -> None:
    run_command(*command("overfit"), folder=tmp_path)
    assert results(tmp_path, "overfit")["metrics"]["val_accuracy"] >= 0.98
