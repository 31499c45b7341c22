"""Which momentum in which game: magnitude × phase × rate of complex momentum beside its rivals.

    python scripts/which_momentum.py --output which_momentum

In small games (bilinear, Dirac-GAN, two quadratic mixes) the number of gradients counts until the distance to the
solution is 1e-4 of the first. Networks (a ring of Gaussians, digits with three losses and no penalty, adversarial
training, actor-critics on CartPole and Pendulum) are scored after an equal number of gradients. Players step in
turns, except with extragradient and, in small games, optimistic steps. In networks extragradient makes half as many
updates, each with both gradients on one batch. The rate of every method, and its momentum where it says so, is the
best on the tuning seeds; the other seeds are
reported. Writes JSON, tables and a PNG.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _actor_critic_game import ActorCriticGame, PendulumGame
from _network_games import AdversarialTraining, Digits, NetworkGame, Ring, train
from _running import script_parser
from _small_games import GAMES, MAGNITUDES, PHASES, adapt_row, play

from lightning_nested.figures.style import open_axes, styled_figure
from lightning_nested.files import replace_figure, replace_text
from lightning_nested.networks.adversarial import Hinge, NonSaturating, RelativisticPairing
from lightning_nested.optim import ComplexAdam, Extragradient, OptimisticAdam

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Make = Callable[[Any, float], torch.optim.Optimizer]
SIZES, TURNS = (0.5, 0.8), (0.0, 1 / 8, 1 / 2, 3 / 4, 1.0)  # turns of π
# Steps of a constant gradient, in Adam's units; the last are for steps that are not divided by √v.
SMALL_RATES, LARGE_RATES, PLAIN_RATES = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (0.03, 0.1, 0.3)
FEW_METHODS = (
    *("Adam, β₁ = 0", "Adam, β₁ = 0.5", "Adam, β₁ = 0.9", "OptimisticAdam"),
    *("0.8 at 0.125π", "0.5 at 0.5π", "0.5 at 0.75π", "0.5 at 1π"),
)


@dataclass(frozen=True)
class Entry:
    """Game, gradients after which it is scored, rates to choose from; sign 1 where more is better, else -1.

    Attributes:
        methods: The methods that play it; None: all.
    """

    make: Callable[[Sequence[int]], NetworkGame]
    gradients: int
    rates: Sequence[float]
    sign: int
    methods: Sequence[str] | None = None


NETWORKS = {
    "ring": Entry(Ring, 1000, SMALL_RATES, 1),
    "digits, hinge": Entry(partial(Digits, loss=Hinge()), 600, LARGE_RATES, -1),
    "digits, non-saturating": Entry(partial(Digits, loss=NonSaturating()), 600, LARGE_RATES, -1),
    "digits, relativistic": Entry(partial(Digits, loss=RelativisticPairing()), 600, LARGE_RATES, -1),
    "adversarial training": Entry(AdversarialTraining, 150, SMALL_RATES, 1),
    "actor-critic": Entry(ActorCriticGame, 300, SMALL_RATES, 1, FEW_METHODS),
    "actor-critic, Pendulum": Entry(PendulumGame, 400, LARGE_RATES, 1, FEW_METHODS),
}


def complex_adam(size: float, turn: float) -> Make:
    """Return ComplexAdam whose step under a constant gradient has the size of Adam's."""
    gain = (1 / (1 - size * np.exp(1j * np.pi * turn))).real

    def make(params: Any, rate: float) -> torch.optim.Optimizer:
        return ComplexAdam(params, lr=rate / gain, betas=(size, 0.999), phase=math.pi * turn)

    return make


def rivals(rates: Sequence[float]) -> dict[str, tuple[Make, Sequence[float]]]:
    """Return the methods without a map, with the rates of each."""
    adam: Callable[[float], Make] = lambda beta: (  # noqa: E731
        lambda params, rate: torch.optim.Adam(params, lr=rate, betas=(beta, 0.999))
    )
    return {
        "Adam, β₁ = 0": (adam(0.0), rates),
        "Adam, β₁ = 0.5": (adam(0.5), rates),
        "Adam, β₁ = 0.9": (adam(0.9), rates),
        "OptimisticAdam": (lambda p, rate: OptimisticAdam(p, lr=rate, betas=(0.5, 0.999)), rates),
        "Extragradient (no division by √v)": (lambda p, rate: Extragradient(p, lr=rate), PLAIN_RATES),
    }


def methods(rates: Sequence[float]) -> dict[str, tuple[Make, Sequence[float]]]:
    """Return all methods, with the rates of each."""
    return rivals(rates) | {
        f"{size} at {turn:g}π": (complex_adam(size, turn), rates) for size in SIZES for turn in TURNS
    }


def play_networks(
    entry: Entry, gradients: int, names: Sequence[str], tuning: Sequence[int], seeds: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Return for these methods the chosen rate and the scores of the reported seeds; all seeds train side by side."""
    entries = methods(entry.rates)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        method, rates = entries[name]
        rows[name] = network_row(entry, method, rates, gradients, tuning, seeds)
        print(name, rows[name]["rate"], f"{statistics.median(rows[name]['found']):.4g}", flush=True)
    return rows | _chosen(rows, entry.sign)


def network_row(
    entry: Entry,
    method: Make,
    rates: Sequence[float],
    gradients: int,
    tuning: Sequence[int],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Return the rate that the tuning seeds choose for a method, and its scores on the reported seeds."""
    before, found = time.process_time(), {}
    for rate in rates:

        def optimizer(params: Any, rate: float = rate) -> Any:
            return method(params, rate)

        scores = np.asarray(train(entry.make([*tuning, *seeds]), optimizer, gradients), dtype=float)
        found[rate] = np.where(np.isfinite(scores), scores, -entry.sign * math.inf)
    rate = max(found, key=lambda r: entry.sign * float(np.median(found[r][: len(tuning)])))
    return {
        "rate": rate,
        "tuning": float(np.median(found[rate][: len(tuning)])),
        "found": found[rate][len(tuning) :].tolist(),
        "seconds": time.process_time() - before,
    }


def _chosen(rows: Mapping[str, dict[str, Any]], sign: int) -> dict[str, dict[str, Any]]:
    """Return the momentum, and the negative one, that the tuning seeds like best."""
    maps = {f"{size} at {turn:g}π": turn for size in SIZES for turn in TURNS}

    def best(fits: Callable[[float], bool]) -> dict[str, Any] | None:
        names = [n for n, turn in maps.items() if fits(turn) and n in rows]
        name = max(names, key=lambda n: sign * rows[n]["tuning"], default=None)
        return None if name is None else {**rows[name], "setting": name}

    found = {
        "negative momentum": best(lambda turn: turn == 1),
        "complex, best of the grid": best(lambda turn: 0 < turn < 1),
    }
    medians = [statistics.median(rows[n]["found"]) if n in rows else None for n in maps]
    places = [medians[k : k + len(TURNS)] for k in range(0, len(medians), len(TURNS))]
    return {name: row for name, row in found.items() if row} | {"map": {"found": places}}


def shown(values: Sequence[float], digits: int) -> str:
    """Return ``median [least, largest]``; infinite ones as –."""
    parts = [statistics.median(values), min(values), max(values)]
    texts = [f"{v:.{digits}f}" if math.isfinite(v) else "–" for v in parts]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def table(results: Mapping[str, Mapping[str, dict[str, Any]]], names: Sequence[str], digits: int) -> str:
    """Return a row for each method and a column for each game."""
    games = [g for g in results if any(name in results[g] for name in names)]
    lines = [f"| method | {' | '.join(games)} |", "| --- |" + " --- |" * len(games)]
    for name in names:
        cells = []
        for game in games:
            row = results[game].get(name)
            cells.append("not run" if row is None else shown(row["found"], digits) + _setting(row))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _setting(row: Mapping[str, Any]) -> str:
    """Return what was chosen, in brackets."""
    if "setting" in row:
        return f" ({row['setting']}, {row['rate']:g})"
    if row.get("momentum"):
        return f" ({row['momentum']:g} at {row['phase']:g}π, {row['rate']:.2g})"
    return f" ({row['rate']:.2g})" if "rate" in row else ""


SMALL_ROWS = (
    *(
        "no momentum",
        "positive momentum",
        "negative momentum",
        "complex, 0.8 at π/8",
        "complex, best of the grid",
    ),
    *("optimistic", "extragradient", "read from the spectrum", "adapt=True"),
)
NETWORK_ROWS = (
    *("Adam, β₁ = 0", "Adam, β₁ = 0.5", "Adam, β₁ = 0.9", "OptimisticAdam"),
    *("Extragradient (no division by √v)", "negative momentum", "0.8 at 0.125π", "complex, best of the grid"),
)


def figure(results: Mapping[str, Mapping[str, dict[str, Any]]], path: Path) -> None:
    """Draw a map of magnitude and phase for each game: dark where it is best."""
    rows = math.ceil(len(results) / 3)
    with styled_figure(12.0, 0.3 + 2.1 * rows, dpi=110, layout="constrained") as whole:
        axes = whole.subplots(rows, 3, squeeze=False).flatten()
        for axis, (game, found) in zip(axes, results.items(), strict=False):
            _panel(axis, game, found)
        for axis in axes[len(results) :]:
            axis.set_axis_off()
        replace_figure(path, whole)


def _panel(axis: Axes, game: str, rows: Mapping[str, dict[str, Any]]) -> None:
    values = np.array(rows["map"]["found"], dtype=float)
    small = game in GAMES
    sizes, turns = (MAGNITUDES, PHASES) if small else (SIZES, TURNS)
    is_cost = small or game.startswith("digits")
    finite = values[np.isfinite(values)]
    least, most = (float(finite.min()), float(finite.max())) if len(finite) else (1.0, 1.0)
    if is_cost:  # how many times the least
        shade = np.clip(1 - np.log(values / least) / math.log(8), 0, 1)
    else:
        shade = np.clip(1 - (most - values) / (0.5 * abs(most) or 1.0), 0, 1)
    axis.imshow(shade, cmap="Blues", vmin=0, vmax=1.35, aspect="auto", origin="lower")
    for (i, j), value in np.ndenumerate(values):
        axis.text(j, i, _cell(value), ha="center", va="center", fontsize=8)
    unit = "gradients" if small else "distance" if is_cost else "score"
    open_axes(axis, f"{game}: {unit}", "phase / π", "|β|")
    axis.grid(visible=False)
    axis.set_xticks(range(len(turns)), [str(Fraction(t)) for t in turns])
    axis.set_yticks(range(len(sizes)), [f"{s:g}" for s in sizes])


def _cell(value: float) -> str:
    """Return a number of a map; nothing where it was not run, – where it is infinite."""
    if not math.isfinite(value):
        return "" if math.isnan(value) else "–"
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}"


def played_with(game: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that a game's results depend on, as they come back from JSON."""
    own: dict[str, Any] = {"tuning_seeds": list(options.tuning_seeds), "seeds": list(options.seeds)}
    if game in GAMES:
        return own | {"adapt_rates": list(options.adapt_rates)}
    gradients = options.gradients or NETWORKS[game].gradients
    return own | {"gradients": gradients, "methods": chosen_methods(game, options)}


def chosen_methods(game: str, options: argparse.Namespace) -> list[str]:
    """Return the names of the methods that play a game of networks."""
    return list(options.methods or NETWORKS[game].methods or methods(()))


def play_game(game: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the rows of a game."""
    seeds = options.tuning_seeds, options.seeds
    if game in NETWORKS:
        gradients = options.gradients or NETWORKS[game].gradients
        return play_networks(NETWORKS[game], gradients, chosen_methods(game, options), *seeds)
    rows: dict[str, Any] = play(GAMES[game], *seeds)
    if options.adapt_rates:
        rows["adapt=True"] = adapt_row(GAMES[game], *seeds, options.adapt_rates)
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Play the games, print the tables, write JSON and figure."""
    parser = script_parser(__doc__)
    parser.add_argument("--games", nargs="+", choices=[*GAMES, *NETWORKS], default=[*GAMES, *NETWORKS])
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--gradients", type=int, help="of networks, in place of each game's own number")
    text = "methods that play the networks, by their names in the output; default: all, and a few for actor-critics"
    parser.add_argument("--methods", nargs="+", choices=list(methods(())), metavar="METHOD", help=text)
    text = "rates that adapt=True is tried with, over the largest |eigenvalue|; none: leave it out"
    parser.add_argument("--adapt-rates", type=float, nargs="*", default=[0.1, 0.3], help=text)
    text = "for JSON and PNG; a game that is in the JSON already, with the same options, is not played again"
    parser.add_argument("--output", type=Path, default=Path(), help=text)
    options: argparse.Namespace = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "which_momentum.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    wanted = {game: played_with(game, options) for game in options.games}
    for game in options.games:
        stored = results.get(game, {}).get("options")
        if game in results and stored != wanted[game]:
            parser.error(f"{path} has {game!r} with {stored}. Got {wanted[game]}; give another --output")
    for game in options.games:
        print(game, flush=True)
        if game not in results:
            results[game] = {**play_game(game, options), "options": wanted[game]}
            replace_text(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    ordered = {game: results[game] for game in (*GAMES, *NETWORKS) if game in results}
    small = {g: r for g, r in ordered.items() if g in GAMES}
    large = {g: r for g, r in ordered.items() if g in NETWORKS}
    for rows, names, digits in ((small, SMALL_ROWS, 0), (large, NETWORK_ROWS, 3)):
        if rows:
            print(table(rows, names, digits), end="\n\n")
    figure(ordered, options.output / "which_momentum.png")
    return ordered


if __name__ == "__main__":
    main()
