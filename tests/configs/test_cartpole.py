"""The shipped actor-critic: a short run, and the whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_nested.cli.main import main
from lightning_nested.modules import ActorCritic
from tests.command import run_command

COMMAND = ("fit", "--config", "cartpole")

pytestmark = pytest.mark.usefixtures("own_folder")


def results(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("runs/cartpole/version_*/results.json")
    assert (path.parent / "cartpole.png").stat().st_size > 5_000
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gymnasium")
    main([*COMMAND, "--trainer.max_steps=4", "--data.num_batches=3", "--trainer.enable_checkpointing=true"])
    found = results(tmp_path)
    assert found["game_updates"] == 4
    # Chance: about 20 steps.
    assert 8 < found["mean_return"] < 60
    assert "mean return of the last 100 episodes" in capsys.readouterr().out
    module = ActorCritic.load_from_checkpoint(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert module.act(torch.zeros(3, 4)).shape == (3,)


@pytest.mark.slow
def test_the_pole_is_balanced(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    run_command(*COMMAND, folder=tmp_path)
    assert results(tmp_path)["mean_return"] >= 200
