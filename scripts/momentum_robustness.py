"""Momentum chosen from the spectrum against tuned momentum, on mixtures of cooperation and conflict.

    python scripts/momentum_robustness.py --output docs/images

Quadratic games with a share of conflict from none to full (`QuadraticGame.mixture`), every method run as it is, in
float64, until the distance to the solution has fallen to `--tolerance` of the first one; what counts are evaluations of
the joint gradient: one a step, two for extragradient. Every rival has a grid of learning rates (in units of 1/largest
|eigenvalue|) and momenta, simultaneous and alternating where it has momentum, and is run twice: with the one setting of
the grid that is best over all games (by predicted rate), and with the best one for each game in hindsight (the fastest
in the run itself of the `--candidates` with the best predicted rates). Ours reads its settings from the eigenvalues,
exact or wrong by 10 %, before the run. Writes JSON, CSV and a PNG.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _running import script_parser
from _two_player_runs import Array, Settings, evaluations, quadratic

from lightning_nested.figures.style import COLOURS, GREY, open_axes, styled_figure
from lightning_nested.files import replace_figure, replace_text
from lightning_nested.games import (
    QuadraticGame,
    convergence_rate,
    extragradient_rate,
    optimistic_rate,
    suggest_momentum,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, NOISY = "ours", "ours, 10 % noise"
RATES = np.geomspace(0.03, 4.5, 24)
MOMENTA = np.array([0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9])
PHASES = {"positive": 0.0, "negative": math.pi, "complex π/8": math.pi / 8}
_METHODS = ("complex π/8", OURS, "optimistic", "negative")
METHOD_COLOURS = dict(zip(_METHODS, COLOURS, strict=False)) | {"positive": GREY, "extragradient": COLOURS[5]}


def rivals() -> dict[str, Settings]:
    """Return the grid of every rival, with learning rates for a largest eigenvalue of modulus 1."""
    lr, momentum, order = (v.reshape(-1) for v in np.meshgrid(RATES, MOMENTA, [False, True], indexing="ij"))
    grids = {
        name: Settings(lr=lr, beta=momentum * np.exp(1j * phase), alternating=order.astype(bool))
        for name, phase in PHASES.items()
    }
    fine = np.geomspace(RATES[0], RATES[-1], 8 * len(RATES))
    for name in ("optimistic", "extragradient"):
        grids[name] = Settings(lr=fine, beta=0j * fine, alternating=fine < 0, method=name)
    return grids


def suggested(eigenvalues: torch.Tensor, noise: float) -> tuple[Settings, dict[str, Any]]:
    """Return our settings, and the suggestion they come from."""
    advice = suggest_momentum(eigenvalues, alternating=True, noise=noise)
    settings = Settings(
        lr=np.array([advice.lr]),
        beta=np.array([advice.momentum * np.exp(1j * advice.phase)]),
        alternating=np.array([advice.alternating]),
    )
    return settings, {**advice.settings, "rate": advice.rate, "alternating": advice.alternating}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Game and its start."""

    share: float
    seed: int
    own: Array
    coupling: Array
    start: tuple[Array, Array]
    eigenvalues: torch.Tensor

    @classmethod
    def draw(cls, share: float, seed: int, size: int) -> Case:
        """Draw a game and its start from the seed."""
        generator = torch.Generator().manual_seed(seed)
        game = QuadraticGame.mixture(size, share, generator)
        x, y = (v.detach().numpy() for v in game.initial(generator))
        own, coupling = game.first.diagonal().numpy(), game.coupling.diagonal().numpy()
        values = game.eigenvalues()[:size]  # one of each pair
        scale = float(values.abs().max())
        parts: dict[str, Any] = {
            "own": own / scale,
            "coupling": coupling / scale,
            "eigenvalues": values / scale,
        }
        return cls(share=share, seed=seed, start=(x, y), **parts)

    def predicted(self, grid: Settings) -> Array:
        """Return the worst rate per evaluation of every setting."""
        lr = torch.from_numpy(grid.lr)
        if grid.method == "extragradient":
            return np.asarray(extragradient_rate(self.eigenvalues, lr=lr)) ** 0.5
        if grid.method == "optimistic":
            return np.asarray(optimistic_rate(self.eigenvalues, lr=lr))
        rates = np.empty(len(grid.lr))
        for order in (False, True):
            rows = grid.alternating == order
            beta = torch.from_numpy(grid.beta[rows])
            found = convergence_rate(
                self.eigenvalues, lr=lr[rows], momentum=beta.abs(), phase=beta.angle(), alternating=order
            )
            rates[rows] = np.asarray(found)
        return rates

    def run(self, settings: Settings, tolerance: float, limit: int) -> Array:
        """Count the evaluations that every setting needs."""
        return evaluations(quadratic(self.own, self.coupling), self.start, settings, tolerance, limit)

    def wrong_eigenvalues(self) -> torch.Tensor:
        """Return eigenvalues wrong by up to 10 % in random directions, but not left of the imaginary axis."""
        generator = torch.Generator().manual_seed(1000 + self.seed)
        wrong = self.eigenvalues * (1 + 0.1 * _disc(len(self.eigenvalues), generator))
        return torch.complex(wrong.real.clamp_min(0.0), wrong.imag)


def needed(rates: Array, tolerance: float, limit: int) -> Array:
    """Return the log of the evaluations that a rate predicts, at most twice the limit."""
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(rates < 1, math.log(tolerance) / np.log(rates), np.inf)
    logarithms: Array = np.log(np.clip(steps, 1, 2 * limit))
    return logarithms


def _disc(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw uniform points of the unit disc."""
    radius, angle = torch.rand(2, count, generator=generator, dtype=torch.float64)
    return torch.polar(radius.sqrt(), 2 * math.pi * angle)


def play(cases: Sequence[Case], options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Count evaluations of all methods in all cases; return them and the suggestions to ours."""
    tolerance, limit = options.tolerance, options.limit
    grids = rivals()
    scores = {
        name: np.stack([needed(c.predicted(grid), tolerance, limit) for c in cases])
        for name, grid in grids.items()
    }
    choice = {name: int(score.mean(axis=0).argmin()) for name, score in scores.items()}
    champion = min(grids, key=lambda name: float(scores[name].mean(axis=0).min()))
    fixed: dict[str, list[float]] = {name: [] for name in grids}
    hindsight: dict[str, list[float]] = {name: [] for name in grids}
    ours: dict[str, list[float]] = {OURS: [], NOISY: []}
    advices = []
    for i, case in enumerate(cases):
        for name, grid in grids.items():
            rows = np.argsort(scores[name][i], kind="stable")[: options.candidates]
            counts = case.run(grid.take(np.append(rows, choice[name])), tolerance, limit)
            fixed[name].append(float(counts[-1]))
            hindsight[name].append(float(counts.min()))
        advice: dict[str, Any] = {"share": case.share, "seed": case.seed}
        for name, seen, noise in ((OURS, case.eigenvalues, 0.0), (NOISY, case.wrong_eigenvalues(), 0.1)):
            if name == NOISY and case.seed >= options.noisy_seeds:
                ours[name].append(math.nan)
                continue
            settings, advice[name] = suggested(seen, noise)
            ours[name].append(float(case.run(settings, tolerance, limit)[0]))
        advices.append(advice)
        print(f"share {case.share:.3f} seed {case.seed}: ours {ours[OURS][-1]:g}", flush=True)
    found = {
        "fixed": {name: np.array(v) for name, v in fixed.items()},
        "hindsight": {name: np.array(v) for name, v in hindsight.items()},
        "fixed settings": {name: _describe(name, row) for name, row in choice.items()},
        "champion": champion,
    }
    found["ours"] = {name: _against(np.array(v), found) for name, v in ours.items()}
    return found, advices


def _against(counts: Array, found: dict[str, Any]) -> dict[str, Any]:
    """Compare ours with its rivals, in the cases where it ran."""
    ran = ~np.isnan(counts)
    best_fixed = np.stack(list(found["fixed"].values())).min(axis=0)
    best_hindsight = np.stack(list(found["hindsight"].values())).min(axis=0)
    both = ran & np.isfinite(counts) & np.isfinite(best_hindsight)
    quantiles = np.quantile((counts / best_hindsight)[both], [0.0, 0.25, 0.5, 0.75, 0.9, 1.0])
    return {
        "counts": counts,
        "cases": int(ran.sum()),
        "did not arrive": int(np.isinf(counts).sum()),
        "no more than the champion": float((counts <= found["fixed"][found["champion"]])[ran].mean()),
        "no more than any method with its fixed setting": float((counts <= best_fixed)[ran].mean()),
        "no more than any method tuned in hindsight": float((counts <= best_hindsight)[ran].mean()),
        "at most 5 % more than any method tuned in hindsight": float(
            (counts <= 1.05 * best_hindsight)[ran].mean()
        ),
        "ratio to the best in hindsight, quantiles 0 25 50 75 90 100 %": [float(q) for q in quantiles],
    }


def _describe(name: str, row: int) -> dict[str, Any]:
    grid = rivals()[name]
    described: dict[str, Any] = {"lr × largest |eigenvalue|": round(float(grid.lr[row]), 4)}
    if grid.method == "momentum":
        described |= {
            "momentum": round(float(abs(grid.beta[row])), 4),
            "alternating": bool(grid.alternating[row]),
        }
    return described


def figure(shares: Array, cases: Sequence[Case], found: dict[str, Any], path: Path) -> None:
    """Draw median and quartiles of the evaluations over the share of conflict, by both readings."""
    where = np.array([case.share for case in cases])
    with styled_figure(10.5, 4.6, dpi=110, layout="constrained") as whole:
        axes = whole.subplots(1, 2, sharey=True)
        titles = ("rivals: one setting for every game", "rivals: tuned for each game in hindsight")
        for axis, reading, title in zip(axes, ("fixed", "hindsight"), titles, strict=True):
            for name, counts in found[reading].items():
                _band(axis, shares, where, counts, name)
            _band(axis, shares, where, found["ours"][OURS]["counts"], OURS)
            open_axes(axis, title, "largest share of conflict γ in the game", "")
            axis.set_yscale("log")
        axes[0].set_ylabel("gradient evaluations to 10⁻⁶")
        hidden = _same(found["fixed"])
        if hidden:
            text = f"{', '.join(hidden)}: one curve,\ntheir best setting is the same"
            axes[0].text(0.98, 0.03, text, transform=axes[0].transAxes, ha="right", fontsize=9)
        handles, labels = axes[0].get_legend_handles_labels()
        whole.legend(handles, labels, loc="outside lower center", ncols=6)
        replace_figure(path, whole)


def _same(counts: dict[str, Array]) -> list[str]:
    """Return the methods whose counts equal those of another one."""
    return [n for n, c in counts.items() if sum(np.array_equal(c, other) for other in counts.values()) > 1]


def _band(axis: Axes, shares: Array, where: Array, counts: Array, name: str) -> None:
    """Draw a median line and quartile band, with gaps where too many runs did not arrive."""
    quartiles = np.array(
        [np.quantile(counts[where == s], [0.25, 0.5, 0.75], method="nearest") for s in shares]
    )
    quartiles[~np.isfinite(quartiles)] = np.nan
    colour = METHOD_COLOURS[name]
    width, order = (2.4, 3) if name == OURS else (1.4, 2)
    axis.plot(shares, quartiles[:, 1], color=colour, label=name, lw=width, zorder=order)
    axis.fill_between(shares, quartiles[:, 0], quartiles[:, 2], color=colour, alpha=0.12, lw=0)


def write(
    options: argparse.Namespace,
    cases: Sequence[Case],
    advices: Sequence[dict[str, Any]],
    found: dict[str, Any],
) -> None:
    """Write JSON with everything and CSV with a row per case."""
    names = [*found["fixed"], OURS, NOISY]
    table = StringIO()
    writer = csv.writer(table)
    rivals_names = [f"{n} ({r})" for r in ("fixed", "hindsight") for n in found["fixed"]]
    writer.writerow(["share", "seed", *rivals_names, OURS, NOISY])
    for i, case in enumerate(cases):
        rivals_of = [found[r][n][i] for r in ("fixed", "hindsight") for n in found["fixed"]]
        ours = [found["ours"][n]["counts"][i] for n in (OURS, NOISY)]
        writer.writerow([f"{case.share:.4g}", case.seed, *(f"{c:g}" for c in (*rivals_of, *ours))])
    replace_text(options.output / "momentum_robustness.csv", table.getvalue())
    medians = {
        name: float(np.nanmedian(found[r][name] if r else found["ours"][name]["counts"]))
        for name in names
        for r in (["hindsight"] if name in found["hindsight"] else [""])
    }
    summaries = {
        "settings": {"size": options.size, "tolerance": options.tolerance, "limit": options.limit},
        "cases": len(cases),
        "fixed settings": found["fixed settings"],
        "champion": found["champion"],
        "medians, rivals in hindsight": medians,
        "medians, rivals fixed": {n: _plain(float(np.median(c))) for n, c in found["fixed"].items()},
        "failed, rivals fixed": {n: int((~np.isfinite(c)).sum()) for n, c in found["fixed"].items()},
        "ours": {n: {k: v for k, v in d.items() if k != "counts"} for n, d in found["ours"].items()},
        "suggestions": advices,
    }
    text = json.dumps(summaries, indent=1, default=float, ensure_ascii=False)
    replace_text(options.output / "momentum_robustness.json", text + "\n")
    shown = {k: v for k, v in summaries.items() if k != "suggestions"}
    print(json.dumps(shown, indent=1, default=float, ensure_ascii=False))


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main() -> None:
    """Run every case, print the summary, write the files."""
    parser = script_parser(__doc__)
    parser.add_argument("--mixtures", type=int, default=20, help="shares of conflict from 0 to 1")
    parser.add_argument("--seeds", type=int, default=10)
    text = "seeds in which ours also works from eigenvalues 10 %% wrong"
    parser.add_argument("--noisy-seeds", type=int, default=3, help=text)
    parser.add_argument("--size", type=int, default=10, help="numbers each player holds")
    parser.add_argument(
        "--candidates", type=int, default=24, help="settings tried for each game in hindsight"
    )
    parser.add_argument("--tolerance", type=float, default=1e-6)
    parser.add_argument("--limit", type=int, default=3_000, help="evaluations after which a run is given up")
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()

    shares = np.linspace(0.0, 1.0, options.mixtures)
    cases = [Case.draw(float(share), seed, options.size) for share in shares for seed in range(options.seeds)]
    found, advices = play(cases, options)
    options.output.mkdir(parents=True, exist_ok=True)
    write(options, cases, advices, found)
    figure(shares, cases, found, options.output / "momentum_robustness.png")


if __name__ == "__main__":
    main()
