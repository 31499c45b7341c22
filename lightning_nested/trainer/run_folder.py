"""Where a report goes: the folder of the run's logger, and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run_folder(trainer: Trainer) -> Path:
    """The folder of the run's logger, without one ``default_root_dir``; to be asked on every process together."""
    return Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is sent from process 0 to the others


def write_report(
    trainer: Trainer,
    folder: Path,
    name: str,
    results: dict[str, Any],
    figure: Figure,
    step: int,
    *,
    file: str = "results.json",
) -> None:
    """Write the results and ``<name>.png``, and the figure to loggers that take figures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    figure.savefig(folder / f"{name}.png")
    for logger in trainer.loggers:
        add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
        if add_figure is not None:
            add_figure(name, figure, step)
