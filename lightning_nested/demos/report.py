"""Base of the reports: what they found stays at hand after ``fit``."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from lightning_nested.trainer.notebook import html_table
from lightning_nested.trainer.run_folder import write_report
from lightning_nested.trainer.use import OneFitCallback

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report(OneFitCallback):
    """Base of callbacks that end a fit with a table, ``results.json`` and the figure ``<name>.png``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.results: dict[str, Any] = {}
        self._figure: Figure | None = None

    def plot(self) -> Figure:
        """Return the figure of the last fit; ``plot().savefig("report.pdf")`` writes it in another format.

        Raises:
            ValueError: No fit has ended yet, or this is not process 0.
        """
        if self._figure is None:
            raise ValueError(
                f"A report is drawn when fit ends, on process 0. Got none from {type(self).__name__}; call plot "
                "after trainer.fit."
            )
        return self._figure

    def _repr_html_(self) -> str:
        """Return the object as it is constructed and, after a fit, a table of its results, for notebooks."""
        rows = html_table(("result", "value"), self.results.items()) if self.results else ""
        return f"<pre>{escape(repr(self))}</pre>{rows}"

    def _write(
        self,
        trainer: Trainer,
        folder: Path,
        figure: Figure,
        step: int,
        text: str,
        *,
        file: str = "results.json",
    ) -> None:
        """Print the text; write results and figure to the folder, and the figure to loggers that take figures."""
        self._figure = figure
        write_report(trainer, folder, self.name, self.results, figure, step, text, file=file)
