"""ReturnReport: the returns of a run, those of the next one, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_nested.demos import ReturnReport, ZooGame
from lightning_nested.games import DiracGAN, Rollout
from lightning_nested.modules import ActorCritic
from tests.trainers import trainer


def rollouts() -> list[Rollout]:
    """The first has no end of an episode, the others end one with a return of 3, then 5."""
    no = torch.zeros(2, 1, dtype=torch.bool)
    return [
        Rollout(
            observations=torch.zeros(3, 1, 1),
            actions=torch.zeros(2, 1),
            rewards=torch.ones(2, 1),
            terminated=no,
            ended=no,
            counts=~no,
            returns=torch.tensor(returns),
        )
        for returns in ([], [3.0], [5.0])
    ]


def fit(report: ReturnReport, folder: Path, **options: Any) -> None:
    torch.manual_seed(0)
    module = ActorCritic(nn.Linear(1, 2), nn.Linear(1, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    trainer(report, folder=folder, **options).fit(module, DataLoader(rollouts(), batch_size=None))  # type: ignore[arg-type]


def test_mean_returns_after_each_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = ReturnReport("known")
    fit(report, tmp_path)
    assert report.history == [(2, 3.0), (3, 4.0)]
    assert report.results["mean_return"] == report.results["best_mean_return"] == 4.0
    assert report.results["best_at"] == report.results["game_updates"] == 3
    assert json.loads((tmp_path / "results.json").read_text())["history"] == [[2, 3.0], [3, 4.0]]
    assert (tmp_path / "known.png").stat().st_size > 5_000
    assert "mean return of the last 100 episodes" in capsys.readouterr().out
    restored = ReturnReport()
    restored.load_state_dict(report.state_dict())
    assert restored.history == report.history
    # Another module: not a continuation.
    fit(report, tmp_path, max_steps=2)
    assert report.history == [(2, 3.0)]
    # One that ends before its first episode has no results, and not those of the run before.
    fit(report, tmp_path, max_steps=1)
    assert not report.results
    with pytest.raises(ValueError, match="Got none from ReturnReport"):
        report.plot()


def test_a_run_without_the_end_of_an_episode_has_no_report(tmp_path: Path) -> None:
    report = ReturnReport()
    fit(report, tmp_path, max_steps=1)
    assert not report.results
    assert not list(tmp_path.glob("*.png"))


def test_a_module_without_returns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Got ZooGame; use ActorCritic"):
        trainer(ReturnReport(), folder=tmp_path).fit(ZooGame(DiracGAN()))
