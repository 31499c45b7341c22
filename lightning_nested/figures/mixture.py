"""Figure of the shares of a mixture, or the weights of a loss, and of a score on validation data, over a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_nested.figures.style import BLUE, COLOURS, GREY, open_axes, styled_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Weights that differ by more than this factor are drawn on a logarithmic axis.
_DECADES = 30.0


def mixture_figure(
    steps: Sequence[int],
    shares: Mapping[str, Sequence[float]],
    scores: Sequence[tuple[int, float]],
    monitor: str,
    title: str,
    *,
    weights: bool = False,
) -> Figure:
    """Draw a line for the share of each source, named at its end, and the score beside it.

    Args:
        steps: Training steps.
        shares: Shares at those steps by source.
        scores: Training step and score on validation data.
        monitor: Name of the score.
        title: Line above both.
        weights: Whether the numbers are weights of the parts of a loss: they need not sum to one, and if they are far
            apart the axis is logarithmic.
    """
    largest, smallest = max(map(max, shares.values())), min(map(min, shares.values()))
    decades = weights and smallest > 0 and largest > _DECADES * smallest
    with styled_figure(11.0, 4.2, dpi=110, layout="constrained") as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.6, 1.0])
        for k, (name, values) in enumerate(shares.items()):
            left.plot(steps, values, color=COLOURS[k % len(COLOURS)], lw=1.8, label=name)
        for k, (name, height) in enumerate(_apart(shares, decades)):
            colour = COLOURS[list(shares).index(name) % len(COLOURS)]
            left.annotate(
                f"{name} {shares[name][-1]:.3g}" if weights else f"{name} {shares[name][-1]:.2f}",
                (steps[-1], height),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=9.5,
                annotation_clip=False,
                gid=f"source {k}",
            )
        if decades:
            left.set_yscale("log")
        else:
            left.set_ylim(0, 1.05 * largest)
        if weights:
            open_axes(left, "Weight of each part of the loss", "training step", "weight")
        else:
            left.axhline(1 / len(shares), color=GREY, lw=1, ls=":", label="equal shares")
            open_axes(left, "Share of each source", "training step", "share")
        if scores:
            right.plot(*zip(*scores, strict=True), color=BLUE, marker="o", ms=3, lw=1.6, label=monitor)
            right.legend()
        if decades and min(score for _, score in scores or [(0, 0.0)]) > 0:
            right.set_yscale("log")
        where = "On the validation data" if weights else "On held-out text of the target"
        open_axes(right, where, "training step", monitor)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _apart(shares: Mapping[str, Sequence[float]], decades: bool) -> list[tuple[str, float]]:
    """Return names with heights near the ends of their lines, from the lowest, so that texts do not overlap."""
    scale, back = (math.log, math.exp) if decades else (float, float)
    ends = {name: scale(values[-1]) for name, values in shares.items()}
    low = scale(min(map(min, shares.values()))) if decades else 0.0
    gap = 0.055 * 1.05 * (scale(max(map(max, shares.values()))) - low)
    placed, last = [], -math.inf
    for name, value in sorted(ends.items(), key=lambda pair: pair[1]):
        last = max(value, last + gap)
        placed.append((name, back(last)))
    return placed
