"""Figure of a learned learning rate beside cosine and a constant one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_nested.figures.style import BLUE, COLOURS, GREEN, ORANGE, open_axes, styled_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def schedule_figure(rates: Sequence[float], losses: Mapping[str, float], begins: int) -> Figure:
    """Draw rates over the run, and the test loss that each led to.

    Args:
        rates: Learned rate of each step.
        losses: Test losses of a constant rate, of cosine, and of the learned one, by their names.
        begins: Step of the first outer step.
    """
    steps, peak = range(len(rates)), rates[0]
    constant, cosine, learned = losses
    with styled_figure(10.0, 3.8, dpi=110, layout="constrained") as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.6, 1.0])
        left.plot(steps, [peak] * len(rates), color=COLOURS[7], lw=1.2, ls=":", label=constant)
        curve = [peak * 0.5 * (1 + math.cos(math.pi * t / max(1, len(rates)))) for t in steps]
        left.plot(steps, curve, color=ORANGE, lw=1.4, label=cosine)
        left.plot(steps, rates, color=BLUE, lw=1.8, label=learned)
        if begins < len(rates):
            left.axvline(begins, color=GREEN, lw=1.0, ls="--", label="tuning begins")
        open_axes(left, "Learning rate", "training step", "rate of the first group")
        left.legend()
        bars = right.barh(list(losses), list(losses.values()), color=[COLOURS[7], ORANGE, BLUE], height=0.6)
        right.bar_label(bars, fmt="%.3f", padding=3)
        right.set_xlim(0, 1.2 * max(losses.values()))
        right.invert_yaxis()
        open_axes(right, "After the run", "test loss", "")
    return figure
