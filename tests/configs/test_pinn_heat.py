"""The shipped physics-informed network: a short run from the command line, and the whole one beside equal weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_nested.cli.main import main
from tests.command import run_command

COMMAND = ("fit", "--config", "pinn_heat", "--trainer.enable_progress_bar=false")


def results(folder: Path, printed: str) -> dict[str, Any]:
    assert "weight of each part of the loss at the end" in printed
    (path,) = folder.glob("runs/pinn_heat/version_*/results.json")
    assert (path.parent / "pinn_heat.png").stat().st_size > 20_000
    return dict(json.loads(path.read_text()))


@pytest.mark.usefixtures("own_folder")
def test_a_short_run_moves_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*COMMAND, "--trainer.max_epochs=2", "--data.steps=20", "--model.points=20"])
    found = results(tmp_path, capsys.readouterr().out)
    assert found["steps"] == [0, 20, 40]
    assert set(found["final"]) == {"equation", "initial", "boundary"}
    # Two outer steps, of factors of at most exp(0.2) each.
    assert all(1 < max(weight, 1 / weight) < 1.5 for weight in found["final"].values())
    assert [step for step, _ in found["error"]] == [20, 40]


@pytest.mark.slow
def test_learned_weights_are_far_ahead_of_equal_ones(tmp_path: Path) -> None:
    errors = {}
    for name, options in {
        "learned": [],
        "equal": ["--trainer.callbacks.HypergradientCallback.every_n_steps=100000"],
    }.items():
        (tmp_path / name).mkdir()
        errors[name] = results(tmp_path / name, run_command(*COMMAND, *options, folder=tmp_path / name))[
            "error"
        ][-1][1]
    # The bar; seen: 0.07 to 0.17.
    assert errors["learned"] < 0.8 * errors["equal"]
