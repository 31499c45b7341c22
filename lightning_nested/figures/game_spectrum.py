"""Log-polar figure of a game's spectrum, with contours of the rate that its momentum gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_nested.figures.style import COLOURS, FAINT, TEXT, styled_figure
from lightning_nested.games.rates import eigenvalue_rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_nested.games.measured_spectrum import MeasuredSpectrum

# The region where the momentum contracts, its contours of equal rate, and its border.
_CONTRACTS, _CONTOUR, _BORDER = "#e8f1e4", "#9ebf90", "#4c8a37"
_LEVELS = (0.9, 0.97, 0.99, 0.997)
# Below the largest eigenvalue; single precision does not know the angle of smaller ones.
_DECADES = 5
_SQUARE: dict[str, Any] = {"s": 22, "marker": "s", "facecolors": "none"}


def spectrum_figure(
    spectra: Sequence[MeasuredSpectrum], players: Sequence[str], titles: Sequence[str] | None = None
) -> Figure:
    """Draw the eigenvalues of DJ, logarithm of the modulus against angle, in a panel per measurement.

    0 is cooperation, ± π/2 conflict, ± π repulsion. In the green region the current momentum contracts; its contours
    assume equal curvatures where players alternate, see :func:`lightning_nested.games.convergence_rate`. A full circle
    is an eigenvalue of the game, coloured by the player to whom its eigenvector belongs where that is known; an open
    square is one of a player's own block.

    Args:
        spectra: One per panel.
        players: Names, in the game's order.
        titles: One per panel; None: the game updates.
    """
    sizes = [abs(z) for s in spectra for z in s.eigenvalues.tolist() if abs(z) > 0]
    top = math.ceil(2 * math.log10(max(sizes, default=1.0)) + 0.3) / 2
    bottom = max(math.floor(math.log10(min(sizes, default=0.1)) - 0.2), top - _DECADES)
    with styled_figure(4.3 * len(spectra) + 0.9, 4.6, layout="constrained") as figure:
        axes = figure.subplots(1, len(spectra), sharey=True, squeeze=False)[0]
        for index, (panel, spectrum) in enumerate(zip(axes, spectra, strict=True)):
            _draw(panel, spectrum, players, bottom, top)
            title = titles[index] if titles else f"after {spectrum.game_updates} game updates"
            panel.set_title(title + _caption(spectrum))
        axes[0].set_ylabel("arg λ")
        _legend(axes[-1], spectra, players)
    return figure


def _draw(axes: Axes, spectrum: MeasuredSpectrum, players: Sequence[str], bottom: float, top: float) -> None:
    axes.set(xlim=(bottom, top), ylim=(-math.pi * 1.04, math.pi * 1.04))
    ticks = {-1.0: "−π", -0.5: "−π/2", 0.0: "0", 0.5: "π/2", 1.0: "π"}
    axes.set_yticks([math.pi * t for t in ticks], list(ticks.values()))
    for t in ticks:
        axes.axhline(math.pi * t, color=FAINT, linewidth=0.7, zorder=0.5)
    _contours(axes, spectrum, bottom, top)
    # −0.0 + 0.0 = 0.0: negative real numbers go to π, not to −π.
    values = spectrum.eigenvalues.numpy() + 0.0
    visible = np.abs(values) > 10.0**bottom
    colours = np.full(len(values), TEXT, dtype=object)
    if spectrum.shares is not None:
        colours = np.array([COLOURS[i % len(COLOURS)] for i in spectrum.shares.argmax(dim=1)], dtype=object)
    values, colours = values[visible], colours[visible]
    x = np.log10(np.abs(values))
    left_out = int((~visible).sum())
    axes.set_xlabel("log₁₀ |λ|" + (f"  ({left_out} smaller ones not drawn)" if left_out else ""))
    size = 26 if len(values) < 100 else 11
    axes.scatter(x, np.angle(values), s=size, c=colours, alpha=0.75, linewidths=0, zorder=3, clip_on=False)
    for index, name in enumerate(players):
        own = spectrum.own.get(name)
        if own is not None:
            real = own.numpy()
            real = real[np.abs(real) > 10.0**bottom]
            x = np.log10(np.abs(real))
            # Beside the lines 0 and π, or the eigenvalues of the game would hide them.
            y = np.where(real >= 0, 0.0, math.pi) + 0.16 * (index + 1) * np.where(real >= 0, 1, -1)
            axes.scatter(x, y, edgecolors=COLOURS[index % len(COLOURS)], zorder=3, **_SQUARE)


def _contours(axes: Axes, spectrum: MeasuredSpectrum, bottom: float, top: float) -> None:
    momentum = spectrum.momentum
    if momentum is None or momentum.kind != "momentum":
        return
    radius, angle = np.meshgrid(np.linspace(bottom, top, 120), np.linspace(0, math.pi, 91))
    plane = torch.from_numpy(10.0**radius * np.exp(1j * angle))
    rates = eigenvalue_rates(
        plane, lr=1.0, momentum=momentum.momentum, phase=momentum.phase, alternating=spectrum.alternating
    ).numpy()
    # λ and its conjugate have one rate.
    for side in (angle, -angle):
        axes.contourf(radius, side, rates, levels=[0.0, 1.0], colors=[_CONTRACTS], zorder=0)
        axes.contour(radius, side, rates, levels=_LEVELS, colors=_CONTOUR, linewidths=0.7, zorder=1)
        axes.contour(radius, side, rates, levels=[1.0], colors=_BORDER, linewidths=1.4, zorder=1)


def _caption(spectrum: MeasuredSpectrum) -> str:
    momenta = [m for m in spectrum.momenta.values() if m is not None and m.kind == "momentum"]
    if not momenta:
        return ""
    one = momenta[:1] if spectrum.momentum is not None else momenta
    sizes = ", ".join(f"{m.momentum:.2g}" for m in one)
    phases = ", ".join(f"{m.phase / math.pi:.3g}π" for m in one)
    rate = "" if spectrum.rate is None else f", worst rate {spectrum.rate:.4f}"
    if spectrum.rate is not None and spectrum.equal_curvatures:
        rate += "\n(rates assume equal curvatures)"
    return f"\n|β| = {sizes}, arg β = {phases}{rate}"


def _legend(axes: Axes, spectra: Sequence[MeasuredSpectrum], players: Sequence[str]) -> None:
    shared, own = spectra[0].shares is not None, bool(spectra[0].own)
    for index, name in enumerate(players):
        colour = COLOURS[index % len(COLOURS)]
        if shared:
            axes.scatter([], [], s=26, c=colour, linewidths=0, label=f"mostly {name}")
        if own:
            axes.scatter([], [], edgecolors=colour, label=f"{name} alone", **_SQUARE)
    if not shared:
        axes.scatter([], [], s=26, c=TEXT, linewidths=0, label="game")
    contracted = any(s.momentum is not None and s.momentum.kind == "momentum" for s in spectra)
    if contracted:
        axes.fill_between([], [], color=_CONTRACTS, label="this momentum contracts")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
