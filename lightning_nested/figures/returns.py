"""Figure of the returns of a policy over its training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_nested.figures.style import BLUE, open_axes, styled_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def return_figure(history: list[tuple[int, float]], title: str) -> Figure:
    """Draw the mean returns ``(game_updates, mean_return)``."""
    with styled_figure(6.4, 3.6, layout="constrained") as figure:
        axes = figure.subplots()
        axes.plot(*zip(*history, strict=True), color=BLUE, lw=1.8, label="mean of the last 100 episodes")
        open_axes(axes, "Sum of rewards in an episode", "game updates", "return")
        axes.set_ylim(bottom=min(0.0, *(value for _, value in history)))
        axes.legend(loc="lower right")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure
