"""Figure of a run that found wrong labels: weights, losses and the images it trusts least."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_nested.figures.style import (
    BLUE,
    COLOURS,
    FAINT,
    GREEN,
    GREY,
    MUTED,
    ORANGE,
    open_axes,
    styled_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


RIGHT, WRONG = BLUE, ORANGE
_DECAYS = COLOURS[3:]
# Images a side.
_GRID = 5


@dataclass(kw_only=True)
class Trace:
    """History of a run: one entry per outer step, as plain numbers.

    Attributes:
        step: Inner step at which the outer step was made.
        train_loss: The loss that the inner optimizer stepped on.
        val_loss: The outer loss.
        right: 10 %, 50 % and 90 % quantiles of the weights of right labels.
        wrong: The same for wrong labels.
        decays: Decay by name; of several in one tensor their median.
    """

    step: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    right: list[list[float]] = field(default_factory=list)
    wrong: list[list[float]] = field(default_factory=list)
    decays: dict[str, list[float]] = field(default_factory=dict)


def label_noise_figure(
    *,
    weights: Tensor,
    wrong: Tensor,
    images: Tensor,
    given: Tensor,
    clean: Tensor,
    trace: Trace,
    summary: str = "",
) -> Figure:
    """Draw weights of right and wrong labels, their history, the losses, and the lowest-weighted images.

    Args:
        weights: ``(n,)`` in natural units.
        wrong: ``(n,)`` boolean, the labels that are known to be wrong.
        images: ``(n, channels, height, width)`` in [0, 1].
        given: ``(n,)`` labels trained on.
        clean: ``(n,)`` right labels.
        trace: The history.
        summary: A line below the title.
    """
    with styled_figure(14, 8, dpi=110) as figure:
        title = f"{int(wrong.sum())} of {len(wrong)} training labels are wrong: their weights fall as the model trains"
        figure.text(0.02, 0.955, title, fontsize=17, fontweight="bold")
        figure.text(0.02, 0.916, summary, fontsize=12, color=MUTED)
        # Two grids side by side, because pictures and axes want different spacing.
        edges = {"left": 0.055, "right": 0.615, "top": 0.845, "bottom": 0.075}
        plots = figure.add_gridspec(2, 3, **edges, hspace=0.42, wspace=0.42, height_ratios=(1.05, 1))
        _histograms(figure.add_subplot(plots[0, :]), weights, wrong)
        _losses(figure.add_subplot(plots[1, 0]), trace)
        _weights(figure.add_subplot(plots[1, 1]), trace)
        _decays(figure.add_subplot(plots[1, 2]), trace)
        _pictures(figure, weights, wrong, images, given, clean)
    return figure


def _histograms(axes: Axes, weights: Tensor, wrong: Tensor) -> None:
    top = max(1.0, float(weights.max()))
    # Side by side in each bin: bars over one another would hide the few in the other's peak.
    axes.hist(
        [weights[wrong].tolist(), weights[~wrong].tolist()],
        bins=torch.linspace(0.0, top, 26).tolist(),
        color=[WRONG, RIGHT],
        label=[f"wrong label ({int(wrong.sum())} images)", f"right label ({int((~wrong).sum())} images)"],
        rwidth=0.92,
    )
    title = "Learned weight of each training image"
    open_axes(axes, title, "weight of the image in the training loss", "number of images")
    axes.set_xlim(0.0, top)
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper center")


def _losses(axes: Axes, trace: Trace) -> None:
    axes.plot(trace.step, trace.train_loss, color=GREY, lw=1.6, label="training, weighted")
    axes.plot(trace.step, trace.val_loss, color=GREEN, lw=1.9, label="validation")
    open_axes(axes, "Losses", "training step", "cross-entropy (nats)")
    if trace.step:
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    axes.legend(loc="best", handlelength=1.3)


def _weights(axes: Axes, trace: Trace) -> None:
    for name, rows, colour in (("right", trace.right, RIGHT), ("wrong", trace.wrong, WRONG)):
        low, middle, high = zip(*rows, strict=True) if rows else ((), (), ())
        axes.fill_between(trace.step, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(trace.step, middle, color=colour, lw=1.9, label=name)
    open_axes(axes, "Weights", "training step", "weight (median, 10–90 %)")
    axes.set_ylim(bottom=0.0)
    axes.legend(loc="center right", title="label", handlelength=1.3)


def _decays(axes: Axes, trace: Trace) -> None:
    open_axes(axes, "Weight decays", "training step", "decay (L2 coefficient)" if trace.decays else "")
    if not trace.decays:
        axes.text(0.5, 0.5, "none tuned", transform=axes.transAxes, ha="center", color=MUTED)
        return
    for i, (name, values) in enumerate(trace.decays.items()):
        dashes = (0, (4, 1.5)) if name.endswith("bias") else "-"
        label = _layer_names(trace.decays)[name]
        axes.plot(trace.step, values, color=_DECAYS[i % len(_DECAYS)], lw=1.7, ls=dashes, label=label)
    axes.set_yscale("log")
    if len(trace.decays) <= 6:
        low, high = axes.get_ylim()
        # Room for the legend.
        axes.set_ylim(low * (low / high) ** 0.45, high)
        axes.legend(loc="lower left", handlelength=1.9, labelspacing=0.3)


def _layer_names(names: Iterable[str]) -> dict[str, str]:
    """Number the layers in their order: ``a.0.weight`` is ``layer 1 weight``."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    return {
        name: f"layer {layers.index(layer) + 1} {kind}" if layer else kind
        for name, (layer, _, kind) in ((name, name.rpartition(".")) for name in names)
    }


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _pictures(
    figure: Figure, weights: Tensor, wrong: Tensor, images: Tensor, given: Tensor, clean: Tensor
) -> None:
    chosen = torch.argsort(weights, stable=True)[: _GRID**2].tolist()
    caught = int(wrong[chosen].sum())
    left, right = 0.665, 0.985
    title = f"The lowest weights: {caught} of {len(chosen)} labels are wrong"
    figure.text(left, 0.858, title, fontsize=12, fontweight="bold")
    figure.text(left, 0.03, "label as given", fontsize=10, color=WRONG, fontweight="bold")
    figure.text(left + 0.083, 0.03, "(right label)", fontsize=10, color=MUTED)
    if caught < len(chosen):
        figure.text(left + 0.16, 0.03, "framed: the given label was right", fontsize=10, color=RIGHT)
    edges = {"left": left, "right": right, "top": 0.815, "bottom": 0.065}
    grid = figure.add_gridspec(_GRID, _GRID, **edges, hspace=0.42, wspace=0.12)
    for place, index in enumerate(chosen):
        axes = figure.add_subplot(grid[place // _GRID, place % _GRID], xticks=[], yticks=[])
        picture = images[index].squeeze(0) if images.shape[1] == 1 else images[index].movedim(0, -1)
        axes.imshow(picture.tolist(), cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
        is_wrong = bool(wrong[index])
        for spine in axes.spines.values():
            spine.set_color(FAINT if is_wrong else RIGHT)
            spine.set_linewidth(0.8 if is_wrong else 2.6)
        colour = WRONG if is_wrong else RIGHT
        axes.set_title(str(int(given[index])), color=colour, fontsize=14, pad=3, fontweight="bold")
        if is_wrong:
            axes.set_title(f"({int(clean[index])})", color=MUTED, fontsize=10, pad=4, loc="right")
