"""What shipped runs leave behind lies under runs/, and their figures say what they show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from lightning_nested.cli.find_configs import shipped_configs, shipped_rides
from lightning_nested.figures.game_report import game_figure
from lightning_nested.figures.mode_coverage import mode_figure
from lightning_nested.figures.returns import return_figure
from lightning_nested.figures.tuning import tuning_figure
from lightning_nested.hyperparameters.outer_report import ValueTrace

REPORTS = {
    "AugmentationReport",
    "DistillationReport",
    "GameReport",
    "LabelNoiseReport",
    "MixtureReport",
    "ModeCoverage",
    "ReturnReport",
    "TuningReport",
}


@pytest.mark.parametrize("name", [*shipped_configs(), *shipped_rides()])
def test_runs_lie_under_runs(name: str) -> None:
    settings: dict[str, Any] = yaml.safe_load((shipped_configs() | shipped_rides())[name].read_text())
    if name in shipped_rides():
        assert settings["output"] == f"runs/{name}"
        return
    trainer = settings["trainer"]
    logger = trainer.get("logger", {}).get("init_args", {})
    # One that changes another configuration has no logger of its own.
    folders = [logger.get("save_dir"), trainer.get("default_root_dir")]
    assert any(folders)
    assert all(folder is None or folder.split("/")[0] == "runs" for folder in folders)
    for callback in trainer.get("callbacks", []):
        if callback["class_path"] in REPORTS:
            assert callback["init_args"]["name"] == logger["name"] == name


def figures() -> dict[str, Any]:
    module = SimpleNamespace(
        distances=[1.0, 0.5, 0.25],
        path=[[1.0, 1.0], [0.5, 0.5], [0.2, 0.1]],
        solution=torch.zeros(2),
        game=SimpleNamespace(sizes=(1, 1), names=("first", "second")),
    )
    trace = ValueTrace()
    for step in (1, 2):
        trace.add(step, 1.0 / step, {"a": [0.1 * step, 0.1, 0.3, 2], "b": [10.0 * step] * 3 + [1]})
    now = {"a": [0.3, 0.1, 0.4, 2], "b": [30.0, 30.0, 30.0, 1]}
    samples = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    centres = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    return {
        "game": game_figure(module, {"game": "xy", "predicted_rate": 0.5}),
        "modes": mode_figure([(0, 0, 0.0), (5, 2, 0.5)], [(0, samples), (5, samples)], centres, 0.1),
        "returns": return_figure([(1, 20.0), (9, 80.0)], "a run"),
        "tuning": tuning_figure(trace, 3, now, now, "a run"),
    }


@pytest.mark.parametrize("name", ["game", "modes", "returns", "tuning"])
def test_a_figure_has_titles_labels_and_legends(name: str) -> None:
    figure = figures()[name]
    assert figure.get_suptitle()
    for axes in figure.axes:
        assert axes.get_ylabel()
        twin = any(other is not axes and other.bbox.bounds == axes.bbox.bounds for other in figure.axes)
        if not twin:
            assert axes.get_xlabel()
            assert axes.get_title() or axes.get_title(loc="left")
    assert sum(axes.get_legend() is not None for axes in figure.axes) >= min(2, len(figure.axes))
