"""Report on how fast a zoo game came to its solution, against the prediction of its spectrum."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.callbacks.game_spectrum import GameSpectrumCallback
from lightning_nested.demos.report import Report
from lightning_nested.figures.game_report import game_figure
from lightning_nested.trainer.run_folder import run_folder, table

# Distances below it, relative to the first, are rounding.
_FLOOR = 1e-13


@checked
class GameReport(Report):
    """Report of a :class:`ZooGame` at the end of ``fit``: a line, ``results.json`` and the figure ``<name>.png``.

    The measured rate is the mean factor of the distance per game update over the second half of the run, down to the
    point where rounding takes over. It is reported with the prediction of the last measurement of a
    :class:`GameSpectrumCallback`, if the Trainer has one.

    Args:
        name: Name of the figure's file.

    Attributes:
        results: Content of ``results.json``; empty before the end of ``fit``.
    """

    def __init__(self, name: str = "game") -> None:
        super().__init__(name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not (hasattr(pl_module, "distances") and hasattr(pl_module, "path")):
            raise MisconfigurationException(
                "GameReport needs a module that records its distances. "
                f"Got {type(pl_module).__name__}; use ZooGame."
            )

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero or not pl_module.distances:
            return
        spectra = [c for c in trainer.callbacks if isinstance(c, GameSpectrumCallback)]  # type: ignore[attr-defined]
        history = spectra[0].history if spectra else []
        distances = pl_module.distances
        self.results = {
            "game": type(pl_module.game).__name__,
            "game_updates": pl_module.game_updates,
            "gradient_evaluations": pl_module.gradient_evaluations,
            "distance_at_start": distances[0],
            "distance_at_end": distances[-1],
            "measured_rate": measured_rate(distances),
            "predicted_rate": history[-1].rate if history else None,
        }
        figure = game_figure(pl_module, self.results)
        text = _summary(self.results)
        self._write(trainer, folder, figure, pl_module.game_updates, text)


def measured_rate(distances: list[float]) -> float | None:
    """Return the mean factor per step over the second half of the unrounded part; None where that is too short.

    >>> round(measured_rate([0.9**t for t in range(100)]), 12)
    0.9
    """
    floor = _FLOOR * (distances[0] if distances else 0.0)
    used = next((t for t, d in enumerate(distances) if not floor < d < math.inf), len(distances))
    first, last = used // 2, used - 1
    if last - first < 2:
        return None
    return math.exp((math.log(distances[last]) - math.log(distances[first])) / (last - first))


def _summary(results: dict[str, Any]) -> str:
    rates = [
        (f"rate per update: {what}", f"{results[key]:.6f}" if results[key] is not None else "none")
        for what, key in (("measured", "measured_rate"), ("predicted", "predicted_rate"))
    ]
    rows = [
        ("game updates", str(results["game_updates"])),
        ("gradient evaluations", str(results["gradient_evaluations"])),
        ("distance to the solution at the start", f"{results['distance_at_start']:.3g}"),
        ("distance to the solution at the end", f"{results['distance_at_end']:.3g}"),
        *rates,
    ]
    return table(results["game"], rows)
