"""Style that all figures share."""

from __future__ import annotations

from typing import Any

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": "#24292f",
    "axes.edgecolor": "#9aa0a8",
    "axes.axisbelow": True,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "text.color": "#24292f",
}
