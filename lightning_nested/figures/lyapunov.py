"""The figure of a run's Lyapunov exponents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_COLOURS = ("#2f6db3", "#e1691e", "#1b9e77", "#6a3d9a", "#b15928", "#c51b7d", "#a6761d", "#525252")


def lyapunov_figure(
    windows: Sequence[int],
    local: Tensor,
    crossings: Sequence[int],
    smoothing: int,
    *,
    unit: str = "training step",
) -> Figure:
    """Running and smoothed local exponents against the training step.

    Args:
        windows: (T,), the step at which each window ended.
        local: (T, k), exponents of each window, nats per step.
        crossings: Steps at which the smoothed first one changed its sign.
        smoothing: Windows of the moving mean.
        unit: What a step is called.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=110, facecolor="white")
    axes = figure.subplots()
    count = torch.arange(1, len(local) + 1, dtype=local.dtype)[:, None]
    running = local.cumsum(0) / count
    width = min(smoothing, len(local))
    total = torch.cat([torch.zeros_like(local[:1]), local.cumsum(0)])
    smooth = (total[width:] - total[:-width]) / width
    axes.axhline(0.0, color="#57606a", lw=0.8)
    for i in range(local.shape[1]):
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(list(windows)[width - 1 :], smooth[:, i].tolist(), color=colour, lw=0.9, alpha=0.5)
        axes.plot(list(windows), running[:, i].tolist(), color=colour, lw=1.9, label=f"exponent {i + 1}")
    for i, step in enumerate(crossings):
        label = None if i else "first changes its sign"
        axes.axvline(step, color="#57606a", lw=0.8, ls=":", label=label)
    visible = torch.cat([smooth, running[len(running) // 20 :]])
    low, high = float(visible.min()), float(visible.max())
    axes.set_ylim(low - 0.08 * (high - low + 1e-12), high + 0.08 * (high - low + 1e-12))
    axes.set_title("Lyapunov exponents of the training", loc="left", fontweight="bold")
    axes.set_xlabel(unit)
    axes.set_ylabel(f"nats per {unit}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#d8dce1", lw=0.6)
    note = f"thick: mean so far; thin: moving mean of {width} windows"
    axes.legend(frameon=False, title=note, ncols=2, loc="best")
    figure.tight_layout()
    return figure
