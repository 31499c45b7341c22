"""Map of the complex momenta with which a Dirac-GAN converges, with simultaneous and alternating updates.

    python scripts/dirac_gan_map.py --output docs/images

For every |β| and phase the learning rate with the best predicted rate is taken, and the GAN itself (not linearized) is
played with it in float64 from near its solution. The colour is the measured number of steps in which the distance to
the solution shrinks tenfold; grey does not converge, by the prediction from the Jacobian's eigenvalues ± i/2. Writes a
PNG, a CSV with a row per point, and a JSON with the best points and how far measured and predicted rates differ.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _running import script_parser
from numpy.typing import NDArray

from lightning_nested.figures.style import styled_figure
from lightning_nested.files import replace_figure, replace_text
from lightning_nested.games import DiracGAN, convergence_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[Any]

# Rates below it converge: the slowest that the smallest learning rates tell from standing still.
_CONVERGES = 0.9999
ORDERS = {"simultaneous": False, "alternating": True}


@dataclass(frozen=True, kw_only=True)
class Map:
    """Rates over |β| (rows) and phase (columns)."""

    momentum: Array
    phase: Array
    lr: Array
    predicted: Array
    measured: Array

    def best(self) -> dict[str, float]:
        """Return the point with the smallest measured rate."""
        row, column = np.unravel_index(np.argmin(self.measured), self.measured.shape)
        return {
            "momentum": float(self.momentum[row]),
            "phase": float(self.phase[column]),
            "lr": float(self.lr[row, column]),
            "measured": float(self.measured[row, column]),
            "predicted": float(self.predicted[row, column]),
        }

    def difference(self) -> dict[str, float]:
        """Compare measured and predicted rates where both converge clearly, so that the run ends near the solution."""
        clear = self.predicted < 0.98
        gap = np.abs(self.measured - self.predicted)[clear]
        return {"points": int(clear.sum()), "median": float(np.median(gap)), "largest": float(gap.max())}


def play(lr: Array, beta: Array, alternating: bool, steps: int) -> Array:
    """Return the distance to the solution after half the steps and after all, of shape (2, *lr.shape).

    The gradients are θσ(ψθ) of the discriminator ψ and −ψσ(ψθ) of the generator θ.
    """
    psi, theta = np.full(lr.shape, 0.1), np.full(lr.shape, 0.1)
    judge, maker = np.zeros(lr.shape, complex), np.zeros(lr.shape, complex)
    found = []
    for step in range(1, steps + 1):
        with np.errstate(over="ignore", invalid="ignore"):
            judge = beta * judge - theta / (1 + np.exp(-psi * theta))
            seen = psi + lr * judge.real
            other = seen if alternating else psi
            maker = beta * maker + other / (1 + np.exp(-other * theta))
            psi, theta = np.clip(seen, -1e6, 1e6), np.clip(theta + lr * maker.real, -1e6, 1e6)
        if step in (steps // 2, steps):
            # Below rounding of the start there is nothing left to measure; momentum counts as distance too.
            found.append(np.sqrt(psi**2 + theta**2 + np.abs(lr * judge) ** 2 + np.abs(lr * maker) ** 2))
    return np.stack(found)


def measure(alternating: bool, size: int, steps: int) -> Map:
    """Measure the map of one order of updates."""
    momentum, phase = np.linspace(0.0, 0.98, size), np.linspace(0.0, math.pi, size)
    m, p = (torch.from_numpy(g)[..., None] for g in np.meshgrid(momentum, phase, indexing="ij"))
    rates = torch.from_numpy(np.geomspace(0.01, 8.0, 48))
    grid = convergence_rate(DiracGAN().eigenvalues(), lr=rates, momentum=m, phase=p, alternating=alternating)
    predicted, which = torch.as_tensor(grid).min(dim=-1)
    lr = rates[which].numpy()
    beta = (m * torch.exp(1j * p))[..., 0].numpy()
    # From half-way on: by then the slowest mode is left. Fast ones stop early, before they reach rounding.
    measured = np.full(lr.shape, np.nan)
    for length in (steps // 16, steps // 4, steps):
        half, end = play(lr, beta, alternating, length)
        fresh = (end > 1e-280) & np.isfinite(end)
        ratio = np.divide(end, half, out=np.full_like(end, np.nan), where=half > 0)
        measured = np.where(fresh, ratio ** (1 / (length - length // 2)), measured)
    return Map(momentum=momentum, phase=phase, lr=lr, predicted=predicted.numpy(), measured=measured)


def figure(maps: dict[str, Map], path: Path) -> None:
    """Draw two panels that share axes and colours."""
    with styled_figure(10.5, 4.2, dpi=110, layout="constrained") as whole:
        axes = whole.subplots(1, 2, sharey=True)
        for axis, (name, found) in zip(axes, maps.items(), strict=True):
            image = _panel(axis, name, found)
        axes[0].set_ylabel("momentum |β|")
        label = "measured steps per factor of ten, best learning rate"
        whole.colorbar(image, ax=axes, label=label, extend="max")
        replace_figure(path, whole)


def _panel(axis: Axes, name: str, found: Map) -> Any:
    from matplotlib.colors import LogNorm

    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(found.measured < 1, math.log(0.1) / np.log(found.measured), np.inf)
    steps[found.predicted >= _CONVERGES] = np.inf
    axis.set_title(name, fontweight="bold")
    axis.set_facecolor("#e9ebee")
    image = axis.pcolormesh(
        found.phase,
        found.momentum,
        np.ma.masked_invalid(steps),
        norm=LogNorm(2, 2000),
        cmap="viridis_r",
        shading="nearest",
        rasterized=True,
    )
    best = found.best()
    axis.plot(best["phase"], best["momentum"], "*", ms=13, mfc="#ffd92f", mec="black")
    axis.annotate(
        f"×{best['measured']:.3f} a step",
        (best["phase"], best["momentum"]),
        textcoords="offset points",
        xytext=(0, 11),
        ha="center",
        fontweight="bold",
    )
    axis.plot(math.pi / 8, 0.8, "o", ms=7, mfc="none", mec="black", mew=1.5)
    axis.annotate("0.8 at π/8", (math.pi / 8, 0.8), textcoords="offset points", xytext=(8, -4))
    axis.set(
        xlabel="phase φ",
        xticks=[0, math.pi / 4, math.pi / 2, 3 * math.pi / 4, math.pi],
        xticklabels=["0\npositive", "π/4", "π/2", "3π/4", "π\nnegative"],
    )
    return image


def write(maps: dict[str, Map], folder: Path) -> None:
    """Write a row per point as CSV, and best points and agreement as JSON, which is printed too."""
    table = StringIO()
    rows = csv.writer(table)
    rows.writerow(["order", "momentum", "phase", "lr", "predicted", "measured"])
    for name, found in maps.items():
        for (i, j), lr in np.ndenumerate(found.lr):
            numbers = (found.momentum[i], found.phase[j], lr, found.predicted[i, j], found.measured[i, j])
            rows.writerow([name, *(f"{x:.6g}" for x in numbers)])
    replace_text(folder / "dirac_gan_map.csv", table.getvalue())
    summary = {
        name: {
            "converge": float((found.measured < 1 - 1e-6).mean()),
            "best": found.best(),
            "measured minus predicted": found.difference(),
        }
        for name, found in maps.items()
    }
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    replace_text(folder / "dirac_gan_map.json", text + "\n")
    print(text)


def main() -> None:
    """Measure both maps, write the files and draw the figure."""
    parser = script_parser(__doc__)
    parser.add_argument("--size", type=int, default=81, help="points along |β| and along the phase")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    maps = {name: measure(order, options.size, options.steps) for name, order in ORDERS.items()}
    write(maps, options.output)
    figure(maps, options.output / "dirac_gan_map.png")


if __name__ == "__main__":
    main()
