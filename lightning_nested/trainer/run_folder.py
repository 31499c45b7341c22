"""Write reports into the folder of the run's logger, and figures to TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_nested.extras import MissingExtraError, require_package
from lightning_nested.files import replace_figure, replace_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the run's logger, or ``default_root_dir``; called on all processes together."""
    # Process 0 sends log_dir to the others.
    return Path(trainer.log_dir or trainer.default_root_dir)


def keeps_files(trainer: Trainer) -> bool:
    """Return False in a ``fast_dev_run``, which leaves no files behind, as Lightning's own callbacks leave none."""
    return not trainer.fast_dev_run  # type: ignore[attr-defined]


def draws_figures() -> bool:
    """Return True if matplotlib can be imported; warn if not, for callbacks whose figures come beside numbers."""
    try:
        require_package("matplotlib")
    except MissingExtraError as error:
        rank_zero_warn(f"No figure is drawn. {error}")
        return False
    return True


def table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return lines of a label and a number each, for reports.

    >>> print(table("xy", [("game updates", "1000"), ("rate", "0.97743")]))
    <BLANKLINE>
    xy
    ---------------------
    game updates     1000
    rate          0.97743
    """
    left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{label:<{left}}  {value:>{right}}" for label, value in rows]
    return "\n".join(["", title, "-" * (left + 2 + right), *lines])


def write_report(
    trainer: Trainer,
    folder: Path,
    name: str,
    results: dict[str, Any],
    figure: Figure,
    step: int,
    text: str,
    *,
    file: str = "results.json",
) -> None:
    """Write the results and ``<name>.png``, and the figure to loggers that take figures; print the text.

    A ``fast_dev_run`` only prints.
    """
    if not keeps_files(trainer):
        print(text, flush=True)
        return
    replace_text(folder / file, json.dumps(results, indent=2) + "\n")
    replace_figure(folder / f"{name}.png", figure)
    for logger in trainer.loggers:
        add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
        if add_figure is not None:
            add_figure(name, figure, step)
    print(f"{text}\n{folder / name}.png and {file} beside it", flush=True)
