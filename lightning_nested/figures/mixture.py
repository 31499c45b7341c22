"""Figure of the shares of a mixture's sources, and of the validation loss, over a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_nested.figures.style import BLUE, COLOURS, GREY, open_axes, styled_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mixture_figure(
    steps: Sequence[int],
    shares: Mapping[str, Sequence[float]],
    scores: Sequence[tuple[int, float]],
    monitor: str,
    title: str,
) -> Figure:
    """Draw a line for the share of each source, named at its end, and the score beside it.

    Args:
        steps: Training steps.
        shares: Shares at those steps by source.
        scores: Training step and score on validation data.
        monitor: Name of the score.
        title: Line above both.
    """
    with styled_figure(11.0, 4.2, dpi=110, layout="constrained") as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.6, 1.0])
        for k, (name, values) in enumerate(shares.items()):
            left.plot(steps, values, color=COLOURS[k % len(COLOURS)], lw=1.8, label=name)
        for k, (name, height) in enumerate(_apart({name: values[-1] for name, values in shares.items()})):
            colour = COLOURS[list(shares).index(name) % len(COLOURS)]
            left.annotate(
                f"{name} {shares[name][-1]:.2f}",
                (steps[-1], height),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=9.5,
                annotation_clip=False,
                gid=f"source {k}",
            )
        left.axhline(1 / len(shares), color=GREY, lw=1, ls=":", label="equal shares")
        left.set_ylim(0, 1.05 * max(max(values) for values in shares.values()))
        open_axes(left, "Share of each source", "training step", "share")
        if scores:
            right.plot(*zip(*scores, strict=True), color=BLUE, marker="o", ms=3, lw=1.6, label=monitor)
            right.legend()
        open_axes(right, "On held-out text of the target", "training step", monitor)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _apart(ends: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return names with heights near the ends of their lines, from the lowest, so that texts do not overlap."""
    gap = 0.055 * 1.05 * max(ends.values())
    placed, last = [], -math.inf
    for name, value in sorted(ends.items(), key=lambda pair: pair[1]):
        last = max(value, last + gap)
        placed.append((name, last))
    return placed
