"""Draw the losses and the path of a game on a closed-form problem."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_nested.figures.style import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_BLUE, _ORANGE, _GREY = "#2f6db3", "#e1691e", "#8a8f98"
FLOOR = 1e-13  # distances below it, relative to the first, are rounding
_LARGEST_LOG = 700.0  # e^700 is still a float64


def summary_line(results: dict[str, Any]) -> str:
    """Return the measured rates as one line of text."""
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


def game_figure(module: Any, results: dict[str, Any]) -> Figure:
    """Draw the distances to the solution, and the path in the plane for games of two numbers."""
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
        figure.suptitle(summary_line(results).strip().partition(":")[0], x=0.01, ha="left", fontweight="bold")
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
