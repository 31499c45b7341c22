"""Style and colours of all figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_nested.extras import require_package

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and orange come first: they stay apart for colour-blind readers and in grey print.
COLOURS = ("#2f6db3", "#e1691e", "#1b9e77", "#6a3d9a", "#b15928", "#a6761d", "#c51b7d", "#525252", "#1f78b4")
BLUE, ORANGE, GREEN = COLOURS[:3]
# Dark, to stand out on a field of red and blue.
DARK_COLOURS = ("#111111", "#1b9e3f", "#e6a100", "#7b3fb5", "#00a6a6", "#d1499b")
TEXT, MUTED, GREY, FAINT = "#24292f", "#57606a", "#8a8f98", "#d8dce1"

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": "#9aa0a8",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "text.color": TEXT,
}


@contextmanager
def styled_figure(width: float, height: float, *, dpi: int = 100, **options: Any) -> Iterator[Figure]:
    """Yield a new figure without a window, of a size in inches; what is drawn inside has the shared style."""
    require_package("matplotlib")
    import matplotlib as mpl  # here, because it costs half a second
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        yield Figure(figsize=(width, height), dpi=dpi, facecolor="white", **options)


def open_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Set a bold title and both labels, drop the frame's top and right, and draw a grid."""
    axes.set_title(title, fontweight="bold")
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True)
