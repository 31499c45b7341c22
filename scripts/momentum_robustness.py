"""Does momentum chosen from the spectrum beat tuned momentum on mixtures of cooperation and conflict?

    python scripts/momentum_robustness.py --output docs/images

Quadratic games with a share of conflict from none to full (`QuadraticGame.mixture`), every method run as it is, in
float64, until the distance to the solution has fallen to `--tolerance` of the first one; what counts are evaluations of
the joint gradient: one a step, two for extragradient. All rivals are given a grid of learning rates (in units of
1/largest |eigenvalue|) and momenta, simultaneous and alternating where they have momentum, and are counted twice: with
the one setting that is best over all mixtures and seeds, and with the setting that is best in each case by hindsight.
Ours reads its settings from the eigenvalues, exact or wrong by 10 %, and has no hindsight. Writes JSON, CSV and a PNG.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_nested.games import QuadraticGame, suggest_momentum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[Any]

OURS, NOISY = "ours", "ours, 10 % noise"
RATES = np.geomspace(0.03, 4.5, 24)
MOMENTA = np.array([0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9])
PHASES = {"positive": 0.0, "negative": math.pi, "complex π/8": math.pi / 8}
COLOURS = {
    "positive": "#8a8f98",
    "negative": "#6a3d9a",
    "complex π/8": "#2f6db3",
    "optimistic": "#1b9e77",
    "extragradient": "#a6761d",
    OURS: "#e1691e",
    NOISY: "#f4a582",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings to run side by side, one row each."""

    lr: Array
    beta: Array  # complex; not used but by "momentum"
    alternating: Array  # bool; likewise
    method: str = "momentum"  # or "optimistic", "extragradient"

    def take(self, rows: Array) -> Settings:
        """Some of the settings."""
        return Settings(
            lr=self.lr[rows], beta=self.beta[rows], alternating=self.alternating[rows], method=self.method
        )


def evaluations(
    own: Array, coupling: Array, start: tuple[Array, Array], settings: Settings, tolerance: float, limit: int
) -> Array:
    """Evaluations of the joint gradient (ax + by, ay − bx) until ‖(x, y)‖ falls to ``tolerance`` of its start.

    Args:
        own: a, of shape (n,).
        coupling: b, of shape (n,).
        start: x and y, each of shape (n,).
        settings: s settings of one method.
        tolerance: Relative distance.
        limit: Evaluations after which a run is given up.

    Returns:
        Float64 of shape (s,), infinite where the tolerance was not reached.
    """
    cost = 2 if settings.method == "extragradient" else 1
    found = np.full(len(settings.lr), np.inf)
    rows = np.arange(len(settings.lr))
    x, y = (np.tile(v, (len(rows), 1)) for v in start)
    memory = [np.zeros_like(x, dtype=complex), np.zeros_like(y, dtype=complex)]
    first = math.hypot(*(float(np.linalg.norm(v)) for v in start))
    running = settings
    for step in range(1, limit // cost + 1):
        x, y = _step(x, y, own, coupling, running, memory, first_step=step == 1)
        size = np.sqrt((x * x + y * y).sum(axis=1)) / first
        arrived = size <= tolerance
        found[rows[arrived]] = step * cost
        if (keep := ~arrived & (size < 1e8)).all():
            continue
        rows, x, y, memory = rows[keep], x[keep], y[keep], [m[keep] for m in memory]
        running = settings.take(rows)
        if not len(rows):
            break
    return found


def _step(
    x: Array, y: Array, a: Array, b: Array, settings: Settings, memory: list[Array], *, first_step: bool
) -> tuple[Array, Array]:
    """One step of every setting; ``memory`` (momentum, or the last gradient) is written."""
    lr = settings.lr[:, None]
    gx, gy = a * x + b * y, a * y - b * x
    if settings.method == "extragradient":
        hx, hy = x - lr * gx, y - lr * gy
        return x - lr * (a * hx + b * hy), y - lr * (a * hy - b * hx)
    if settings.method == "optimistic":
        last = (gx, gy) if first_step else (memory[0].real, memory[1].real)
        memory[:] = [gx.astype(complex), gy.astype(complex)]
        return x - lr * (2 * gx - last[0]), y - lr * (2 * gy - last[1])
    beta = settings.beta[:, None]
    memory[0] = beta * memory[0] - gx
    moved = x + lr * memory[0].real
    gy = a * y - b * np.where(settings.alternating[:, None], moved, x)
    memory[1] = beta * memory[1] - gy
    return moved, y + lr * memory[1].real


def rivals() -> dict[str, Settings]:
    """The grid of every rival, with learning rates for a largest eigenvalue of modulus 1."""
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
    """Ours as settings, and what was suggested."""
    advice = suggest_momentum(eigenvalues, alternating=True, noise=noise)
    settings = Settings(
        lr=np.array([advice.lr]),
        beta=np.array([advice.momentum * np.exp(1j * advice.phase)]),
        alternating=np.array([advice.alternating]),
    )
    return settings, {**advice.settings, "rate": advice.rate, "alternating": advice.alternating}


def one_case(
    share: float, seed: int, size: int, tolerance: float, limit: int, noisy: bool
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Evaluations of every setting of every method in one game, and what was suggested to ours."""
    generator = torch.Generator().manual_seed(seed)
    game = QuadraticGame.mixture(size, share, generator)
    start = tuple(v.detach().numpy() for v in game.initial(generator))
    own, coupling = game.first.diagonal().numpy(), game.coupling.diagonal().numpy()
    values = game.eigenvalues()
    scale = float(values.abs().max())
    grids = rivals()
    momenta = [grids.pop(name) for name in PHASES]
    together = Settings(  # side by side: a step costs little more for three times as many
        lr=np.concatenate([g.lr for g in momenta]),
        beta=np.concatenate([g.beta for g in momenta]),
        alternating=np.concatenate([g.alternating for g in momenta]),
    )
    point, unit = (start[0], start[1]), (own / scale, coupling / scale)
    split = np.split(evaluations(*unit, point, together, tolerance, limit), len(PHASES))
    counts = dict(zip(PHASES, split, strict=True))
    counts |= {name: evaluations(*unit, point, grid, tolerance, limit) for name, grid in grids.items()}
    wrong = values * (1 + 0.1 * _disc(len(values), generator))
    wrong = torch.complex(wrong.real.clamp_min(0.0), wrong.imag)
    advices = {}
    counts[NOISY] = np.array([np.nan])
    tasks = [(OURS, values, 0.0), (NOISY, wrong, 0.1)]
    for name, seen, noise in tasks if noisy else tasks[:1]:
        settings, advices[name] = suggested(seen, noise)
        counts[name] = evaluations(own, coupling, point, settings, tolerance, limit)
    return counts, advices


def _disc(count: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform points of the unit disc."""
    radius, angle = torch.rand(2, count, generator=generator, dtype=torch.float64)
    return torch.polar(radius.sqrt(), 2 * math.pi * angle)


def summary(cases: Sequence[tuple[float, int, dict[str, Array]]], limit: int) -> dict[str, Any]:
    """Evaluations per case of every rival by both readings and of ours, and how often ours needs no more.

    A setting that did not arrive within ``limit`` counts as twice the limit where a best one is chosen.
    """
    names = [name for name in cases[0][2] if name not in (OURS, NOISY)]
    fixed, hindsight, choice = {}, {}, {}
    for name in names:
        counts = np.stack([case[2][name] for case in cases])  # (cases, settings)
        best = int(np.log(np.minimum(counts, 2 * limit)).mean(axis=0).argmin())
        fixed[name], hindsight[name], choice[name] = (
            counts[:, best],
            counts.min(axis=1),
            _describe(name, best),
        )
    # One method with one setting for everything, whichever method that is; and the best of all methods in each case.
    champion = min(names, key=lambda n: float(np.log(np.minimum(fixed[n], 2 * limit)).mean()))
    best_fixed = np.stack([fixed[n] for n in names]).min(axis=0)
    best_hindsight = np.stack([hindsight[n] for n in names]).min(axis=0)
    against = {}
    for ours in (OURS, NOISY):
        counts = np.array([case[2][ours][0] for case in cases])
        ran = ~np.isnan(counts)
        against[ours] = {
            "counts": counts,
            "cases": int(ran.sum()),
            "arrived": float(np.isfinite(counts[ran]).mean()),
            "no more than the champion": float((counts <= fixed[champion])[ran].mean()),
            "no more than the best method with its fixed setting": float((counts <= best_fixed)[ran].mean()),
            "no more than the best method tuned in hindsight": float((counts <= best_hindsight)[ran].mean()),
            "ratio to the best tuned in hindsight": [
                float(q)
                for q in np.quantile((counts / best_hindsight)[ran], [0.0, 0.25, 0.5, 0.75, 0.9, 1.0])
            ],
        }
    return {
        "fixed": fixed,
        "hindsight": hindsight,
        "fixed settings": choice,
        "champion": champion,
        "ours": against,
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


def figure(shares: Array, cases: Sequence[tuple[float, int, Any]], found: dict[str, Any], path: Path) -> None:
    """Median and quartiles of the evaluations over the share of conflict, by both readings."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    style: Any = {
        "font.size": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e3e6ea",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
    }
    where = np.array([case[0] for case in cases])
    with plt.rc_context(style):
        whole, axes = plt.subplots(1, 2, figsize=(10.5, 4.6), sharey=True, layout="constrained")
        titles = ("rivals: one setting for every game", "rivals: tuned for each game in hindsight")
        for axis, reading, title in zip(axes, ("fixed", "hindsight"), titles, strict=True):
            for name, counts in found[reading].items():
                _band(axis, shares, where, counts, name)
            for name in (NOISY, OURS):
                _band(axis, shares, where, found["ours"][name]["counts"], name)
            axis.set(title=title, xlabel="largest share of conflict γ in the game", yscale="log")
        axes[0].set_ylabel("gradient evaluations to 10⁻⁶")
        handles, labels = axes[0].get_legend_handles_labels()
        whole.legend(handles, labels, loc="outside lower center", ncols=4)
        whole.savefig(path, dpi=110)
        plt.close(whole)


def _band(axis: Axes, shares: Array, where: Array, counts: Array, name: str) -> None:
    """Median line and quartile band; infinite where that many runs did not arrive."""
    quartiles = np.array(
        [np.nanquantile(counts[where == s], [0.25, 0.5, 0.75], method="nearest") for s in shares]
    )
    quartiles[~np.isfinite(quartiles)] = np.nan
    ours = name in (OURS, NOISY)
    axis.plot(
        shares,
        quartiles[:, 1],
        color=COLOURS[name],
        label=name,
        lw=2.4 if ours else 1.4,
        zorder=3 if ours else 2,
    )
    axis.fill_between(shares, quartiles[:, 0], quartiles[:, 2], color=COLOURS[name], alpha=0.12, lw=0)


def write(
    options: argparse.Namespace,
    cases: Sequence[tuple[float, int, Any]],
    advices: Sequence[dict[str, Any]],
    found: dict[str, Any],
) -> None:
    """JSON with everything, CSV with a row per case."""
    names = [*found["fixed"], OURS, NOISY]
    with (options.output / "momentum_robustness.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "share",
                "seed",
                *(f"{n} ({r})" for r in ("fixed", "hindsight") for n in found["fixed"]),
                OURS,
                NOISY,
            ]
        )
        for i, (share, seed, _) in enumerate(cases):
            rivals_of = [found[r][n][i] for r in ("fixed", "hindsight") for n in found["fixed"]]
            ours = [found["ours"][n]["counts"][i] for n in (OURS, NOISY)]
            writer.writerow([f"{share:.4g}", seed, *(f"{c:g}" for c in (*rivals_of, *ours))])
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
        "suggestions": [{"share": c[0], "seed": c[1], **a} for c, a in zip(cases, advices, strict=True)],
    }
    text = json.dumps(summaries, indent=1, default=float, ensure_ascii=False)
    (options.output / "momentum_robustness.json").write_text(text + "\n", encoding="utf-8")
    shown = {k: v for k, v in summaries.items() if k != "suggestions"}
    print(json.dumps(shown, indent=1, default=float, ensure_ascii=False))


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main() -> None:
    """Run every case, print the summary, write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixtures", type=int, default=20, help="shares of conflict from 0 to 1")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--noisy-seeds",
        type=int,
        default=3,
        help="seeds in which ours also works from eigenvalues 10 %% wrong",
    )
    parser.add_argument("--size", type=int, default=20, help="numbers each player holds")
    parser.add_argument("--tolerance", type=float, default=1e-6)
    parser.add_argument("--limit", type=int, default=3_000, help="evaluations after which a run is given up")
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()

    shares = np.linspace(0.0, 1.0, options.mixtures)
    cases, advices = [], []
    for share in shares:
        for seed in range(options.seeds):
            counts, advice = one_case(
                float(share), seed, options.size, options.tolerance, options.limit, seed < options.noisy_seeds
            )
            cases.append((float(share), seed, counts))
            advices.append(advice)
        print(f"share {share:.3f}: ours {[int(c[2][OURS][0]) for c in cases[-options.seeds :]]}", flush=True)
    found = summary(cases, options.limit)
    options.output.mkdir(parents=True, exist_ok=True)
    write(options, cases, advices, found)
    figure(shares, cases, found, options.output / "momentum_robustness.png")


if __name__ == "__main__":
    main()
