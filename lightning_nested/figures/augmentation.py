"""Figure of images beside what a learned augmentation makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_nested.figures.style import styled_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def augmentation_figure(images: Tensor, augmented: Tensor, title: str) -> Figure:
    """Draw a row for each image: itself, and its versions.

    Args:
        images: ``(n, channels, height, width)``, grey or in colours, with values in [0, 1]; others are clipped.
        augmented: ``(versions, n, channels, height, width)``.
        title: Line above.
    """
    rows, versions = len(images), len(augmented)
    with styled_figure(1.1 * (versions + 1), 1.1 * rows + 0.6, dpi=110, layout="constrained") as figure:
        panels = figure.subplots(rows, versions + 1, squeeze=False)
        for i, row in enumerate(panels):
            for panel, image in zip(row, (images[i], *augmented[:, i]), strict=True):
                panel.set_axis_off()
                shown = image.clamp(0, 1).movedim(0, -1).squeeze(-1)
                panel.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        panels[0, 0].set_title("image", loc="center")
        panels[0, 1].set_title("augmented", loc="center")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure
