"""How fast a zoo game came to its solution, against what its spectrum predicts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_nested.callbacks.game_spectrum import GameSpectrumCallback
from lightning_nested.callbacks.game_spectrum_figure import STYLE
from lightning_nested.callbacks.run_folder import run_folder, write_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#2f6db3", "#e1691e", "#8a8f98"
_FLOOR = 1e-13  # distances below it, relative to the first, are rounding
_LARGEST_LOG = 700.0  # e^700 is still a float64


class GameReport(Callback):
    """At the end of ``fit``: a line, ``results.json`` and the figure ``<name>.png`` of a :class:`ZooGame`.

    The measured rate is the mean factor of the distance per game update over the second half of the run, down to the
    point where rounding takes over. Beside it stands the prediction of the last measurement of a
    :class:`GameSpectrumCallback`, if the Trainer has one.

    Args:
        name: Of the figure's file.

    Attributes:
        results: What was written; empty before the end of ``fit``.
    """

    def __init__(self, name: str = "game") -> None:
        self.name = name
        self.results: dict[str, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
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
        figure = _figure(pl_module, self.results)
        write_report(trainer, folder, self.name, self.results, figure, pl_module.game_updates)
        print(
            _line(self.results), f"{folder / self.name}.png and results.json beside it", sep="\n", flush=True
        )


def measured_rate(distances: list[float]) -> float | None:
    """Mean factor per step over the second half of the positive, unrounded part; None where that is too short.

    >>> round(measured_rate([0.9**t for t in range(100)]), 12)
    0.9
    """
    floor = _FLOOR * (distances[0] if distances else 0.0)
    used = next((t for t, d in enumerate(distances) if not floor < d < math.inf), len(distances))
    first, last = used // 2, used - 1
    if last - first < 2:
        return None
    return math.exp((math.log(distances[last]) - math.log(distances[first])) / (last - first))


def _line(results: dict[str, Any]) -> str:
    rates = [
        f"{what} {results[key]:.6f}"
        for what, key in (("measured", "measured_rate"), ("predicted", "predicted_rate"))
        if results[key] is not None
    ]
    return (
        f"\n{results['game']}: distance to the solution {results['distance_at_start']:.3g} → "
        f"{results['distance_at_end']:.3g} in {results['game_updates']} game updates; "
        f"rate per update: {', '.join(rates) or 'none'}"
    )


def _figure(module: Any, results: dict[str, Any]) -> Figure:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.2), dpi=100, facecolor="white", layout="constrained")
        path, distance = figure.subplots(1, 2)
        _path(path, module)
        steps = range(len(module.distances))
        distance.semilogy(steps, module.distances, color=_BLUE, linewidth=1.6, label="measured")
        rate = results["predicted_rate"]
        if rate is not None:
            distance.semilogy(
                steps,
                _predicted(module.distances, rate),
                color=_ORANGE,
                linestyle="--",
                label=f"rate {rate:.4f} predicted",
            )
            drawn = [d for d in module.distances if 0 < d < 1e300]
            low = max(min(drawn, default=1e-18), 1e-18)
            distance.set_ylim(low / 10, max(drawn, default=low) * 10)
        distance.set_xlabel("game updates")
        distance.set_ylabel("distance to the solution")
        distance.grid(color="#d8dce1", linewidth=0.6)
        distance.legend()
        figure.suptitle(_line(results).strip().partition(":")[0], x=0.01, ha="left", fontweight="bold")
    return figure


def _predicted(distances: list[float], rate: float) -> list[float]:
    """A geometric sequence through the last distance up to the middle that has a logarithm."""
    positive = (t for t, d in enumerate(distances[: len(distances) // 2 + 1]) if 0 < d < math.inf)
    anchor = max(positive, default=0)
    at = distances[anchor] if 0 < distances[anchor] < math.inf else 1e-300
    exponents = (math.log(at) + (t - anchor) * math.log(max(rate, 1e-300)) for t in range(len(distances)))
    return [math.exp(min(max(x, -_LARGEST_LOG), _LARGEST_LOG)) for x in exponents]


def _path(axes: Axes, module: Any) -> None:
    """The first number of each of the first two players."""
    first, second = 0, module.game.sizes[0] if len(module.game.sizes) > 1 else 0
    x, y = ([point[i] for point in module.path] for i in (first, second))
    axes.plot(x, y, color=_BLUE, linewidth=0.8, alpha=0.8)
    axes.plot(x[:1], y[:1], "o", color=_GREY, label="start")
    axes.plot(x[-1:], y[-1:], "o", color=_BLUE, label="end")
    at = module.solution.tolist()
    axes.plot(
        [at[first]], [at[second]], "+", color=_ORANGE, markersize=12, markeredgewidth=2, label="solution"
    )
    axes.set_xlabel(f"{module.game.names[0]}")
    axes.set_ylabel(f"{module.game.names[-1]}")
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(color="#d8dce1", linewidth=0.6)
    axes.legend()
