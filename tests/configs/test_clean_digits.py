"""The main job's configuration: its results, and the files that it writes. For a short run see test_games.py."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_nested.cli.find_configs import shipped_configs
from tests.command import run_command

SETTINGS = yaml.safe_load(shipped_configs()["clean_digits"].read_text(encoding="utf-8"))


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
    (path,) = folder.glob("runs/clean_digits/version_*/results.json")
    assert (path.parent / "clean_digits.png").stat().st_size > 30_000
    assert "given labels, tuned" in printed
    return {**json.loads(path.read_text()), "wall_seconds": time.perf_counter() - began}


def test_the_main_job(tmp_path: Path) -> None:
    results = run(tmp_path, seed=0)
    assert results["test_accuracy"] >= 0.93
    assert results["auroc"] >= 0.95
    # What was tuned is worth at least half of what right labels are worth.
    gain = results["test_accuracy"] - results["test_accuracy_untuned"]
    assert gain > 0.5 * (results["test_accuracy_clean_labels"] - results["test_accuracy_untuned"]) > 0
    assert results["seed"] == 0
    assert results["skipped_outer_steps"] == 0
    assert results["seconds"] <= results["wall_seconds"] < 75


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
