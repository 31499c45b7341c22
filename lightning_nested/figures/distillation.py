"""Figure of distilled images, and of how well fresh networks learn by them over the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_nested.figures.style import BLUE, ORANGE, open_axes, styled_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def distillation_figure(
    images: Tensor, labels: Tensor, history: Sequence[tuple[int, float, float | None]], summary: str
) -> Figure:
    """Draw the images in a grid by class, and accuracies over training steps.

    Args:
        images: ``(n, channels, height, width)``; each is scaled from its least to its largest value.
        labels: ``(n,)``.
        history: Training step, accuracy of a fresh network, and of the run's own where it is another.
        summary: Line above both.
    """
    columns = -(-len(images) // max(1, round((len(images) / 2.5) ** 0.5)))
    rows = -(-len(images) // columns)
    with styled_figure(10.0, 3.6, layout="constrained") as figure:
        parts: Any = figure.subfigures(1, 2, width_ratios=[1.5, 1.0])
        left, right = parts
        panels = list(left.subplots(rows, columns, squeeze=False).flat)
        for panel in panels:
            panel.set_axis_off()
        for panel, image, label in zip(panels, images, labels.tolist(), strict=False):
            low, high = image.min(), image.max()
            shown = ((image - low) / (high - low).clamp_min(1e-9)).movedim(0, -1)
            panel.imshow(shown.squeeze(-1).float().numpy(), cmap="gray", interpolation="nearest")
            panel.set_title(str(label), fontsize=9.5, loc="center", pad=2)
        left.suptitle("Learned images", x=0.02, ha="left", fontweight="bold", fontsize=11.5)
        axes = right.subplots()
        steps = [step for step, _, _ in history]
        axes.plot(steps, [100 * fresh for _, fresh, _ in history], color=BLUE, label="a fresh network")
        warm = [(step, 100 * own) for step, _, own in history if own is not None]
        if warm:
            axes.plot(*torch.tensor(warm).T.tolist(), color=ORANGE, label="the run's own network")
        open_axes(axes, "Trained on the learned images alone", "training step", "validation accuracy (%)")
        axes.legend(loc="lower right")
        figure.suptitle(summary, x=0.01, ha="left", fontsize=10)
    return figure
