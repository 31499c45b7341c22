"""Figure of generated samples around the modes of a mixture, and of how many were covered over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_nested.figures.style import BLUE, GREEN, ORANGE, styled_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def mode_figure(
    history: list[tuple[int, int, float]], pictures: list[tuple[int, Tensor]], centres: Tensor, std: float
) -> Figure:
    """Draw samples at the start, twice on the way and at the end, and the counts over the run.

    Args:
        history: ``(game_updates, modes, share of high quality)``.
        pictures: ``(game_updates, samples)``.
        centres: ``(modes, 2)``.
        std: Standard deviation of each mode.
    """
    last = len(pictures) - 1
    chosen = sorted({0, max(last // 8, min(last, 1)), last // 2, last})
    with styled_figure(3.1 * (len(chosen) + 1) + 0.6, 3.4, layout="constrained") as figure:
        *panels, counts = figure.subplots(1, len(chosen) + 1, width_ratios=[1.0] * len(chosen) + [1.25])
        for panel, index in zip(panels, chosen, strict=True):
            updates, samples = pictures[index]
            _, modes, quality = history[index]
            _samples(panel, samples, centres, std)
            panel.set(xlabel="x", ylabel="y")
            panel.set_title(f"{updates} updates\n{modes} modes, {100 * quality:.0f} % good")
        panels[0].legend(loc="upper left", handletextpad=0.3, borderaxespad=0.1, fontsize=8.5)
        _counts(counts, history, len(centres))
        figure.suptitle("Samples of the generator", x=0.01, ha="left", fontweight="bold")
    return figure


def _samples(axes: Axes, samples: Tensor, centres: Tensor, std: float) -> None:
    from matplotlib.patches import Circle

    for i, (x, y) in enumerate(centres.tolist()):
        around = Circle((x, y), max(3 * std, 0.03), facecolor="none", edgecolor=ORANGE, linewidth=1.2)
        around.set_label("3σ of a mode" if i == 0 else None)
        axes.add_patch(around)
    x, y = samples.mT.tolist()
    axes.scatter(x, y, s=3, color=BLUE, alpha=0.35, linewidths=0, label="samples")
    reach = 1.35 * float(centres.abs().max())
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])


def _counts(axes: Axes, history: list[tuple[int, int, float]], num_modes: int) -> None:
    updates, modes, quality = zip(*history, strict=True)
    (covered,) = axes.plot(updates, modes, color=BLUE, linewidth=1.8, label="modes covered")
    axes.set(xlabel="game updates", ylim=(-0.02 * num_modes, 1.06 * num_modes))
    axes.set_ylabel("modes covered", color=BLUE)
    share = axes.twinx()
    (good,) = share.plot(
        updates, [100 * q for q in quality], color=GREEN, linewidth=1.8, label="high quality"
    )
    share.legend(handles=[covered, good], loc="lower right")
    share.set_ylim(-2, 106)
    share.set_ylabel("samples of high quality (%)", color=GREEN)
    axes.set_title(f"{int(modes[-1])} of {num_modes} modes\nat the end")
