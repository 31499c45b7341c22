"""The shipped learned rate: a short run from the command line, and the whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_nested.cli.main import main
from tests.command import run_command

COMMAND = ("fit", "--config", "learned_rate", "--trainer.enable_progress_bar=false")


def results(folder: Path, printed: str) -> dict[str, Any]:
    assert "cosine to zero" in printed
    (path,) = folder.glob("runs/learned_rate/version_*/results.json")
    assert (path.parent / "learned_rate.png").stat().st_size > 20_000
    return dict(json.loads(path.read_text()))


@pytest.mark.usefixtures("own_folder")
def test_a_short_run_compares_three_schedules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*COMMAND, "--trainer.max_epochs=1"])
    found = results(tmp_path, capsys.readouterr().out)
    assert found["steps"] == len(found["rates"]) == 44
    assert found["outer_steps"] == 2
    assert set(found["test_loss"]) == set(found["val_loss"]) == {"constant", "cosine", "learned"}
    # The user's until the first outer step, at 70 % of the run.
    assert found["rates"][:30] == pytest.approx([0.05] * 30, rel=1e-6)
    # It only falls.
    assert found["rates"][-1] <= 0.05
    assert found["test_loss"]["cosine"] != pytest.approx(found["test_loss"]["constant"])


@pytest.mark.slow
def test_a_rate_that_falls_late_is_near_cosine(tmp_path: Path) -> None:
    losses = []
    for seed in range(5):
        (tmp_path / str(seed)).mkdir()
        printed = run_command(*COMMAND, f"--seed_everything={seed}", folder=tmp_path / str(seed))
        losses.append(results(tmp_path / str(seed), printed)["test_loss"])
    mean = {arm: sum(loss[arm] for loss in losses) / len(losses) for arm in losses[0]}
    assert mean["learned"] < mean["constant"]
    assert mean["learned"] < 1.1 * mean["cosine"]
