"""Base of the reports: what they found stays at hand after ``fit``."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_nested.extras import require_package
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

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        require_package("matplotlib")

    def _require_one_process(self, trainer: Trainer) -> None:
        """Refuse several processes, of a report that trains references.

        Raises:
            MisconfigurationException: With a cure.
        """
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} trains its references in one process. "
                f"Got world_size={trainer.world_size}; use Trainer(devices=1), or leave the report out."
            )

    def _require_test_step(self, module: LightningModule, metric: str) -> None:
        """Refuse a module without ``test_step``, which must log ``metric``.

        Raises:
            MisconfigurationException: With a cure.
        """
        if not is_overridden("test_step", module):
            raise MisconfigurationException(
                f"{type(self).__name__} needs a test_step that logs {metric!r}. "
                f"Got {type(module).__name__} without test_step; define it."
            )

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
