"""Figure of a run's Lyapunov exponents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_nested.figures.style import COLOURS, MUTED, open_axes, styled_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def lyapunov_figure(
    windows: Sequence[int],
    local: Tensor,
    crossings: Sequence[int],
    smoothing: int,
    *,
    unit: str = "training step",
) -> Figure:
    """Draw running means and moving means of the local exponents against the training step.

    Args:
        windows: (T,), the step at which each window ended.
        local: (T, k), exponents of each window, nats per step.
        crossings: Steps at which the moving mean of the first exponent changed its sign.
        smoothing: Windows of the moving mean.
        unit: Name of a step on the axes.
    """
    count = torch.arange(1, len(local) + 1, dtype=local.dtype)[:, None]
    running = local.cumsum(0) / count
    width = min(smoothing, len(local))
    smooth = local.unfold(0, width, 1).mean(dim=-1)
    with styled_figure(8, 4.2, dpi=110) as figure:
        axes = figure.subplots()
        axes.axhline(0.0, color=MUTED, lw=0.8)
        for i in range(local.shape[1]):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(list(windows)[width - 1 :], smooth[:, i].tolist(), color=colour, lw=0.9, alpha=0.5)
            axes.plot(list(windows), running[:, i].tolist(), color=colour, lw=1.9, label=f"exponent {i + 1}")
        for i, step in enumerate(crossings):
            label = None if i else "first changes its sign"
            axes.axvline(step, color=MUTED, lw=0.8, ls=":", label=label)
        visible = torch.cat([smooth, running[len(running) // 20 :]])
        low, high = float(visible.min()), float(visible.max())
        margin = 0.08 * (high - low + 1e-12)
        axes.set_ylim(low - margin, high + margin)
        open_axes(axes, "Lyapunov exponents of the training", unit, f"nats per {unit}")
        note = f"thick: mean so far; thin: moving mean of {width} windows"
        axes.legend(title=note, ncols=2, loc="best")
        figure.tight_layout()
    return figure
