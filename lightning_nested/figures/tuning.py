"""Figures of tuned values and the outer loss over a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_nested.figures.style import BLUE, COLOURS, open_axes, styled_figure
from lightning_nested.hyperparameters.outer_report import Spread, ValueTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Values that differ by more than this factor are drawn on a logarithmic axis.
_DECADES = 30.0


def plot_values(
    trace: ValueTrace,
    outer_steps: int,
    now: Mapping[str, Spread],
    first: Mapping[str, Spread],
    axes: Axes | None = None,
) -> Axes:
    """Draw values against outer steps, of each hyperparameter the mean, and a band from the smallest to the largest.

    Args:
        trace: Values at the outer steps that were logged.
        outer_steps: Outer steps made.
        now: Mean, smallest, largest value and number of values after them, by hyperparameter.
        first: The same before the first one.
        axes: Axes to draw in; None: those of a new figure.

    Raises:
        ValueError: No outer step was made.
    """
    if not outer_steps or not now:
        raise ValueError(
            f"Values are drawn over outer steps. Got {outer_steps} of them; call plot once fit has made some."
        )
    if axes is None:
        with styled_figure(7.0, 4.2, dpi=110, layout="constrained") as figure:
            axes = figure.subplots()
            return plot_values(trace, outer_steps, now, first, axes)
    drawn: list[float] = []
    unknown: Spread = [math.nan, math.nan, math.nan, 0]
    for i, (name, last) in enumerate(now.items()):
        steps = [*([0] if name in first else []), *trace.steps, outer_steps]
        between = trace.values.get(name, [unknown] * len(trace.steps))
        seen = [*([first[name]] if name in first else []), *between, last]
        mean, low, high, count = zip(*seen, strict=True)
        colour = COLOURS[i % len(COLOURS)]
        label = f"{name} (mean of {last[3]})" if last[3] > 1 else name
        axes.plot(steps, mean, color=colour, lw=1.8, label=label)
        if max(count) > 1:
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        drawn += [v for v in mean if math.isfinite(v)]
    if drawn and min(drawn) > 0 and max(drawn) > _DECADES * min(drawn):
        axes.set_yscale("log")
    open_axes(axes, "Tuned values", "outer step", "value (natural units)")
    axes.legend()
    return axes


def tuning_figure(
    trace: ValueTrace, outer_steps: int, now: Mapping[str, Spread], first: Mapping[str, Spread], title: str
) -> Figure:
    """Draw values and the outer loss of a run side by side; the arguments are those of :func:`plot_values`."""
    with styled_figure(11.0, 4.2, dpi=110, layout="constrained") as figure:
        values, loss = figure.subplots(1, 2)
        plot_values(trace, outer_steps, now, first, values)
        loss.plot(
            trace.steps,
            trace.losses,
            color=BLUE,
            lw=1.4,
            marker="o",
            ms=3,
            label="one batch at each logged outer step",
        )
        open_axes(loss, "Outer loss", "outer step", "validation loss of a batch")
        loss.legend()
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure
