"""Figure of the distances and the path of a game whose solution is known."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_nested.figures.style import BLUE, GREY, ORANGE, styled_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# e^700 is still a float64.
_LARGEST_LOG = 700.0


def game_figure(module: Any, results: dict[str, Any]) -> Figure:
    """Draw the distances to the solution, and the path in the plane for games of two numbers."""
    with styled_figure(9.6, 4.2, layout="constrained") as figure:
        path, distance = figure.subplots(1, 2)
        _path(path, module)
        distance.semilogy(
            range(len(module.distances)), module.distances, color=BLUE, lw=1.6, label="measured"
        )
        rate = results["predicted_rate"]
        if rate is not None:
            line = _predicted(module.distances, rate)
            distance.semilogy(
                range(len(line)), line, color=ORANGE, ls="--", label=f"rate {rate:.4f} predicted"
            )
            drawn = [d for d in module.distances if 0 < d < 1e300]
            low = max(min(drawn, default=1e-18), 1e-18)
            distance.set_ylim(low / 10, max(drawn, default=low) * 10)
        distance.set(xlabel="game updates", ylabel="distance to the solution", title="Distance")
        for axes in (path, distance):
            axes.grid()
            axes.legend()
        figure.suptitle(results["game"], x=0.01, ha="left", fontweight="bold")
    return figure


def _predicted(distances: list[float], rate: float) -> list[float]:
    """Return a geometric sequence through the last distance in the first half that has a logarithm."""
    positive = (t for t, d in enumerate(distances[: len(distances) // 2 + 1]) if 0 < d < math.inf)
    anchor = max(positive, default=0)
    at = distances[anchor] if 0 < distances[anchor] < math.inf else 1e-300
    exponents = (math.log(at) + (t - anchor) * math.log(max(rate, 1e-300)) for t in range(len(distances)))
    return [math.exp(min(max(x, -_LARGEST_LOG), _LARGEST_LOG)) for x in exponents]


def _path(axes: Axes, module: Any) -> None:
    """Draw the first number of each of the first two players."""
    first, second = 0, module.game.sizes[0] if len(module.game.sizes) > 1 else 0
    x, y = ([point[i] for point in module.path] for i in (first, second))
    solution = module.solution.tolist()
    axes.plot(x, y, color=BLUE, lw=0.8, alpha=0.8)
    axes.plot(x[:1], y[:1], "o", color=GREY, label="start")
    axes.plot(x[-1:], y[-1:], "o", color=BLUE, label="end")
    axes.plot([solution[first]], [solution[second]], "+", color=ORANGE, ms=12, mew=2, label="solution")
    labels = [f"first number of {module.game.names[i]}" for i in (0, -1)]
    axes.set(xlabel=labels[0], ylabel=labels[1], title="Path of the players")
    axes.set_aspect("equal", adjustable="datalim")
