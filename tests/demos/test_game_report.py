"""GameReport: predicted and measured rates of games that converge, diverge or stand still."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from lightning_nested.callbacks import GameSpectrumCallback
from lightning_nested.demos.game_report import GameReport, measured_rate
from lightning_nested.figures.game_report import _predicted
from lightning_nested.optim import (
    ComplexSGD,
)
from tests.callbacks.running_games import trainer, zoo


def test_the_report_of_a_zoo_game(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = GameReport("xy")
    fit = trainer(GameSpectrumCallback(k=None), report, max_steps=300, folder=tmp_path)
    fit.fit(zoo())
    assert report.results["measured_rate"] == pytest.approx(report.results["predicted_rate"], abs=1e-4)
    assert re.search(r"rate per update: measured +0\.9774", capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "xy.png"}


@pytest.mark.parametrize(
    ("start", "lr", "momentum", "steps"),
    [(1.0, 0.1, 0.8, 600), (0.0, 0.1, 0.8, 4), (1.0, 5.0, 0.0, 200)],
)
def test_a_report_of_a_run_that_diverges_or_stands_still(
    start: float, lr: float, momentum: float, steps: int, tmp_path: Path
) -> None:
    report = GameReport()
    module = zoo(
        optimizer=lambda p: ComplexSGD(p, lr=lr, momentum=momentum, phase=0.0), start=[[start], [start]]
    )
    spectrum = GameSpectrumCallback(10_000, k=None)
    trainer(spectrum, report, max_steps=steps, folder=tmp_path).fit(module)
    assert (tmp_path / "game.png").stat().st_size > 10_000


def test_the_measured_rate_of_a_run_that_diverges() -> None:
    assert measured_rate([1.5**t for t in range(200)]) == pytest.approx(1.5, rel=1e-12)
    assert measured_rate([0.0] * 9) is None
    assert measured_rate([]) is None


@pytest.mark.parametrize("rate", [0.0, 1e-200, 0.9, 1.0, 10.0, 1e200])
def test_a_prediction_that_no_float_can_hold(rate: float) -> None:
    for distances in ([1.0] * 1001, [0.0] * 5, [1.0, math.inf, math.nan], [1e300, 1e-300, 0.0]):
        found = _predicted(distances, rate)
        assert all(0 < d < math.inf for d in found)
    assert _predicted([1.0, 0.9, 0.81], 0.9) == pytest.approx([1.0, 0.9, 0.81])
