"""The one line in projects of others: pytorch-forecasting, lightning-uq-box, and a GPT script with every switch on.

Their modules are not changed. Each fit with the callback comes right after a plain one; the loss on the test data is
read once, at the end. The packages are those of ``requirements.txt``; what is not installed is left out.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

from _measuring import load, parser, print_table, report, start
from _projects import PROJECTS, Project
from lightning.pytorch import Trainer, seed_everything

from lightning_nested import HypergradientCallback, WeightDecay


def fit(project: Project, seed: int, *, tuned: bool, epochs: int) -> dict[str, Any]:
    """Return validation and test loss, CPU time of the fit, and what was tuned."""
    seed_everything(seed, verbose=False)
    module, (train, val, test) = project.make(seed)
    callback = HypergradientCallback(WeightDecay())
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback] if tuned else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **project.options,
    )
    before = time.process_time()
    trainer.fit(module, train, val)
    seconds = time.process_time() - before
    losses = [float(trainer.validate(module, data, verbose=False)[0][project.test]) for data in (val, test)]
    found: dict[str, Any] = {"val": losses[0], "test": losses[1], "seconds": seconds}
    if tuned:
        values = [float(v) for v in callback.values().values()]
        found |= {"values": [min(values), max(values)], "outer_steps": callback.outer_loop.outer_steps}
        found["skipped"] = callback.outer_loop.skipped_steps
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and return the figures."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--only", nargs="*", default=list(PROJECTS), choices=list(PROJECTS), help="projects")
    options.add_argument("--epochs", type=int, default=None, help="in place of each project's own")
    given = options.parse_args(arguments)
    start(given)
    before = load()
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = {}
    rows = []
    for name in given.only:
        project, runs = PROJECTS[name], []
        try:
            for seed in range(given.rounds):
                plain, tuned = (
                    fit(project, seed, tuned=on, epochs=given.epochs or project.epochs)
                    for on in (False, True)
                )
                runs.append({"plain": plain, "tuned": tuned})
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        results[name] = runs
        print(f"{name}: done")
        pairs = [(r["plain"], r["tuned"]) for r in runs]
        cells = [
            _spread([t[key] - p[key] for p, t in pairs])
            if key != "seconds"
            else _spread([t[key] / p[key] for p, t in pairs])
            for key in ("val", "test", "seconds")
        ]
        plain_test = statistics.median(p["test"] for p, _ in pairs)
        decays = [t["values"] for _, t in pairs]
        rows.append(
            [
                name,
                f"{plain_test:.3f}",
                *cells,
                f"{min(a for a, _ in decays):.2g} to {max(b for _, b in decays):.2g}",
            ]
        )
    print_table(
        [
            "project",
            "plain test loss",
            "validation loss, change",
            "test loss, change",
            "CPU time / plain",
            "decays at the end",
        ],
        rows,
    )
    report(given, results, packages=("pytorch-forecasting", "lightning-uq-box"), load_before=before)
    return results


def _spread(values: Sequence[float]) -> str:
    return (
        f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]" if values else str(math.nan)
    )


if __name__ == "__main__":
    main()
