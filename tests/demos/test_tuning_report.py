"""TuningReport, and the values of a run as a plot and as a table in notebooks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.datamodules import DigitsDataModule
from lightning_nested.demos import TuningReport
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.hyperparameters.outer_report import ValueTrace
from lightning_nested.modules import ImageClassifier
from tests.trainers import trainer


def tuner() -> HypergradientCallback:
    return HypergradientCallback(
        WeightDecay(per="tensor"), every_n_steps=1, warmup_steps=0, log_every_n_outer_steps=2
    )


def small() -> tuple[ImageClassifier, DigitsDataModule]:
    return ImageClassifier("mlp", network_options={"hidden": [4]}), DigitsDataModule(
        train_size=40, val_size=40
    )


def test_a_run_that_tunes_decays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback, report = tuner(), TuningReport("decays")
    fit = trainer(callback, report, max_steps=6, max_epochs=-1, folder=tmp_path)
    module, data = small()
    fit.fit(module, datamodule=data)
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["outer_steps"], found["inner_steps"]) == (6, 6)
    assert found["values"] == pytest.approx({k: v.tolist() for k, v in callback.values().items()})
    assert found["end"]["weight_decay"] != found["start"]["weight_decay"]
    assert (tmp_path / "decays.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "hyperparameter" in out
    assert "weight_decay" in out
    assert "6 outer steps" in out

    assert len(report.plot().axes) == 2
    html = report._repr_html_()
    assert html.startswith("<pre>TuningReport(")
    assert "<td>outer_steps</td><td>6</td>" in html

    axes = callback.plot()
    (line,) = axes.get_lines()
    assert line.get_xdata().tolist() == [0, 1, 3, 5, 6]
    assert line.get_ydata()[-1] == pytest.approx(found["end"]["weight_decay"])
    assert axes.get_title(loc="left") == "Tuned values"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("outer step", "value (natural units)")
    assert axes.get_legend() is not None
    assert callback.plot(axes) is axes
    html = callback._repr_html_()
    assert html.startswith("<pre>HypergradientCallback(")
    assert "<td>weight_decay</td>" in html
    assert "6 outer steps, 0 skipped" in html

    # A resumed run draws the whole one.
    resumed = tuner()
    resumed.load_state_dict(callback.state_dict())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    module, data = small()
    trainer(resumed, max_steps=8, max_epochs=-1, folder=tmp_path).fit(
        module, datamodule=data, ckpt_path=tmp_path / "last.ckpt"
    )
    assert resumed.outer_loop.trace.steps == [1, 3, 5, 7]


def test_before_fit_there_is_nothing_to_draw() -> None:
    callback = tuner()
    with pytest.raises(ValueError, match=r"Got 0 of them; call plot once fit has made some"):
        callback.plot()
    assert callback._repr_html_().startswith("<pre>HypergradientCallback(")
    assert "<table>" not in callback._repr_html_()
    with pytest.raises(ValueError, match=r"Got none from TuningReport; call plot after trainer.fit"):
        TuningReport().plot()
    assert "<table>" not in TuningReport()._repr_html_()


def test_a_run_that_tunes_nothing_is_refused(tmp_path: Path) -> None:
    module, data = small()
    with pytest.raises(
        MisconfigurationException, match="TuningReport needs a run that tunes hyperparameters"
    ):
        trainer(TuningReport(), max_steps=1, folder=tmp_path).fit(module, datamodule=data)


def test_a_trace_stays_in_step_with_hyperparameters_that_come_and_go() -> None:
    trace = ValueTrace()
    trace.add(1, 0.5, {"a": [1.0, 1.0, 1.0, 1]})
    trace.add(2, 0.4, {"b": [2.0, 2.0, 2.0, 1]})
    assert trace.steps == [1, 2]
    assert [math.isnan(mean) for mean, *_ in trace.values["a"]] == [False, True]
    assert [math.isnan(mean) for mean, *_ in trace.values["b"]] == [True, False]
