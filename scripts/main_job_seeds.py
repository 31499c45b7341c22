"""Run the shipped main job over seeds and outer rates; print median and spread, write JSON.

    python scripts/main_job_seeds.py --seeds 0 1 2 3 4 --rates 0.03 0.1 0.3

Each run is the command a user types, ``lightning-nested fit --config clean_digits``, in a process of its own,
so that the seconds include imports. A seed decides training, data split and wrong labels.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]
from _running import script_parser

from lightning_nested.cli.find_configs import shipped_configs
from lightning_nested.files import replace_text

CONFIG = "clean_digits"
COLUMNS = {
    "test_accuracy_untuned": "untuned",
    "test_accuracy": "tuned",
    "test_accuracy_clean_labels": "right labels",
    "auroc": "AUROC",
    "wall_seconds": "wall s",
}


def shipped_rate() -> float:
    """Return the outer rate of the configuration."""
    return float(_outer_optimizer(_settings())["lr"])


def run(seed: int, rate: float, folder: Path) -> dict[str, Any]:
    """Run the command in ``folder``; return its ``results.json`` with the seconds that the user waited.

    Raises:
        RuntimeError: The command failed.
    """
    settings = _settings()
    _outer_optimizer(settings)["lr"] = rate
    folder.mkdir(parents=True)
    replace_text(folder / "config.yaml", yaml.safe_dump(settings))
    program = [sys.executable, "-m", "lightning_nested"]
    command = [*program, "fit", "--config", "config.yaml", f"--seed_everything={seed}"]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} must succeed. Got status {done.returncode}:\n{done.stderr[-3000:]}"
        )
    (path,) = folder.rglob("results.json")
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {**results, "rate": rate, "wall_seconds": seconds}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return median, smallest and largest value of each column."""
    columns = {key: [float(r[key]) for r in runs] for key in COLUMNS}
    return {
        key: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for key, values in columns.items()
    }


def _settings() -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(shipped_configs()[CONFIG].read_text(encoding="utf-8"))
    return settings


def _outer_optimizer(settings: dict[str, Any]) -> dict[str, Any]:
    (tuner,) = (c for c in settings["trainer"]["callbacks"] if c["class_path"] == "HypergradientCallback")
    arguments: dict[str, Any] = tuner["init_args"]["optimizer"]["init_args"]
    return arguments


def _row(head: str, values: dict[str, float]) -> str:
    cells = (f"{values[k]:>13.4f}" if k != "wall_seconds" else f"{values[k]:>13.1f}" for k in COLUMNS)
    return f"{head:<18}" + "".join(cells)


def main() -> None:
    """Run, print a row per run and three per rate, write JSON."""
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[shipped_rate()], help="outer learning rates"
    )
    parser.add_argument("--output", type=Path, default=Path("main_job_seeds.json"))
    options = parser.parse_args()

    print(f"{'outer rate, seed':<18}" + "".join(f"{name:>13}" for name in COLUMNS.values()))
    report = []
    with tempfile.TemporaryDirectory() as folder:
        for rate in options.rates:
            runs = []
            for seed in options.seeds:
                runs.append(run(seed, rate, Path(folder, f"{rate}-{seed}")))
                print(_row(f"{rate:g}, {seed}", runs[-1]), flush=True)
            spread = summary(runs)
            for name in ("median", "min", "max"):
                print(_row(f"{rate:g}, {name}", {key: values[name] for key, values in spread.items()}))
            report.append({"rate": rate, "summary": spread, "runs": runs})
    replace_text(options.output, json.dumps(report, indent=2) + "\n")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
