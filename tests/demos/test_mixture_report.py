"""MixtureReport: its record of shares, figure and files, and what it needs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.datamodules import StepsDataModule, TextSourcesDataModule
from lightning_nested.demos import HeatEquation, MixtureReport
from lightning_nested.figures.mixture import mixture_figure
from lightning_nested.hyperparameters import GroupWeights, LossWeights, WeightDecay
from lightning_nested.modules import LanguageModel
from tests.trainers import trainer


def run(folder: Path, hyperparameter: Any, **options: Any) -> MixtureReport:
    data = TextSourcesDataModule(
        ["docstrings", "pydoc"], mixture="tuned", train_tokens=400, max_characters=20_000, length=6,
        vocabulary_size=30, batch_size=4,
    )  # fmt: skip
    module = LanguageModel("lstm", vocabulary_size=30, network_options={"width": 6})
    report = MixtureReport("m", monitor="val_perplexity", every_n_steps=5)
    callback = HypergradientCallback(hyperparameter, every_n_steps=3)
    fit = trainer(
        callback, report, max_epochs=2, limit_train_batches=8, limit_val_batches=2, folder=folder, **options
    )
    fit.fit(module, datamodule=data)
    return report


def test_shares_are_recorded_from_step_to_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path, GroupWeights(["docstrings", "pydoc"], init=[1, 3]))
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["steps"] == [0, 5, 10, 15, 16]
    assert [shares[0] for shares in found["shares"].values()] == pytest.approx([0.25, 0.75])
    for shares in zip(*found["shares"].values(), strict=True):
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert found["final"]["pydoc"] == found["shares"]["pydoc"][-1] != 0.75
    assert [step for step, _ in found["val_perplexity"]] == [8, 16]
    assert (tmp_path / "m.png").stat().st_size > 20_000
    assert "share of each source at the end" in capsys.readouterr().out
    assert report.plot().axes[0].get_xlabel() == "training step"
    again = MixtureReport("m")
    again.load_state_dict(report.state_dict())
    assert again.state_dict() == report.state_dict()


def test_a_run_without_groups_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="add HypergradientCallback"):
        run(tmp_path, WeightDecay())


def test_weights_of_the_parts_of_a_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["equation", "initial", "boundary"]
    callback = HypergradientCallback(LossWeights(names), every_n_steps=3)
    report = MixtureReport("m", every_n_steps=5)
    fit = trainer(callback, report, folder=tmp_path)
    fit.fit(HeatEquation(width=4, points=10), datamodule=StepsDataModule(steps=10))
    found = json.loads((tmp_path / "results.json").read_text())
    assert "shares" not in found
    assert {name: values[0] for name, values in found["weights"].items()} == pytest.approx(
        dict.fromkeys(names, 1.0)
    )
    assert found["final"]["initial"] != 1.0
    assert "weight of each part of the loss at the end" in capsys.readouterr().out
    left, right = report.plot().axes
    assert (left.get_ylabel(), left.get_yscale()) == ("weight", "linear")
    assert right.get_ylabel() == "val_loss"


def test_weights_that_are_far_apart_have_a_logarithmic_axis() -> None:
    weights = {"a": [1.0, 1000.0], "b": [1.0, 900.0], "c": [1.0, 0.02]}
    figure = mixture_figure([0, 10], weights, [(10, 0.5)], "val_loss", "three", weights=True)
    left = figure.axes[0]
    assert left.get_yscale() == "log"
    heights = [text.xy[1] for text in left.texts]
    assert all(high > 1.5 * low for low, high in pairwise(sorted(heights)))
    assert {"a 1e+03", "b 900", "c 0.02"} == {text.get_text() for text in left.texts}


def test_names_at_the_lines_ends_do_not_overlap() -> None:
    shares = {name: [0.25, 0.24 + k / 100] for k, name in enumerate("abcd")}
    figure = mixture_figure([0, 10], shares, [], "val_loss", "four")
    heights = sorted(text.xy[1] for text in figure.axes[0].texts)
    assert len(heights) == 4
    assert min(b - a for a, b in pairwise(heights)) > 0.01
    assert "d 0.27" in [text.get_text() for text in figure.axes[0].texts]
