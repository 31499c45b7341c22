"""The main job's configuration: its results, and the files that it writes."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_nested.cli.find_configs import shipped_configs
from lightning_nested.cli.main import main
from tests.command import run_command

SETTINGS = yaml.safe_load(shipped_configs()["clean_digits"].read_text(encoding="utf-8"))


def results(folder: Path, printed: str) -> dict[str, Any]:
    (path,) = folder.glob("runs/clean_digits/version_*/results.json")
    assert (path.parent / "clean_digits.png").stat().st_size > 30_000
    assert "given labels, tuned" in printed
    return dict(json.loads(path.read_text()))


def run(folder: Path, *, seed: int, rate: float | None = None) -> dict[str, Any]:
    """The command of `make demo` in a process of its own; its results and the seconds a user waited."""
    config = "clean_digits"
    if rate is not None:
        settings = json.loads(json.dumps(SETTINGS))
        (tuner,) = (c for c in settings["trainer"]["callbacks"] if c["class_path"] == "HypergradientCallback")
        tuner["init_args"]["optimizer"]["init_args"]["lr"] = rate
        config = "changed.yaml"
        (folder / config).write_text(yaml.safe_dump(settings))
    began = time.perf_counter()
    printed = run_command("fit", "--config", config, f"--seed_everything={seed}", folder=folder)
    return {**results(folder, printed), "wall_seconds": time.perf_counter() - began}


@pytest.mark.usefixtures("own_folder")
def test_a_short_run_tells_wrong_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = [
        "--trainer.max_epochs=60",
        "--trainer.log_every_n_steps=20",
        "--model.network_options.hidden=[50]",
    ]
    main(["fit", "--config", "clean_digits", *short])
    found = results(tmp_path, capsys.readouterr().out)
    assert (found["steps"], found["outer_steps"], found["skipped_outer_steps"]) == (60, 20, 0)
    assert found["seed"] == 0
    # Chance gives 0.5, with a standard deviation of 0.02.
    assert found["auroc"] > 0.8
    assert found["test_accuracy_clean_labels"] > found["test_accuracy_untuned"]


@pytest.mark.slow
def test_the_main_job(tmp_path: Path) -> None:
    found = run(tmp_path, seed=0)
    assert found["test_accuracy"] >= 0.93
    assert found["auroc"] >= 0.95
    # What was tuned is worth at least half of what right labels are worth.
    gain = found["test_accuracy"] - found["test_accuracy_untuned"]
    assert gain > 0.5 * (found["test_accuracy_clean_labels"] - found["test_accuracy_untuned"]) > 0
    assert found["seed"] == 0
    assert found["skipped_outer_steps"] == 0
    assert found["seconds"] <= found["wall_seconds"] < 75


@pytest.mark.slow
def test_the_main_job_over_seeds(tmp_path: Path) -> None:
    runs = []
    for seed in range(5):
        (tmp_path / str(seed)).mkdir()
        runs.append(run(tmp_path / str(seed), seed=seed))
    assert [r["seed"] for r in runs] == list(range(5))
    assert (
        len({r["test_accuracy_untuned"] for r in runs}) > 1
    )  # a seed is another split, with other wrong labels
    assert statistics.median(r["test_accuracy"] for r in runs) >= 0.935
    assert statistics.median(r["auroc"] for r in runs) >= 0.965
    assert min(r["test_accuracy"] for r in runs) > 0.88


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.03, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_the_main_job_at_other_outer_rates(tmp_path: Path, seed: int, rate: float) -> None:
    assert run(tmp_path, seed=seed, rate=rate)["test_accuracy"] > 0.88
