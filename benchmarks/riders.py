"""Which solutions plain simultaneous gradient, LOLA and the Generalized Ridge Rider find in small games.

Ten seeds each, all from the same starts (standard normal logits). LOLA is the exact form: each player descends
L_i(θ_i, θ_j − η∇_j L_j(θ_i, θ_j)), differentiated through the other's step, η the learning rate; Foerster et al.
(2018), AAMAS 122-130. A rider's answer at a seed is the set of solutions below its branching points; "both" counts the
seeds where one single point branches to both. Also: the Ridge Rider of one loss with 2^d minima, and branches of a
small GAN.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import yaml
from _measuring import load, parser, print_table, report, start
from torch import Tensor
from torch.optim import SGD, Adam

from lightning_nested.cli.find_configs import shipped_rides
from lightning_nested.dynamics import Branching, GeneralizedRidgeRider, RideTree, RidgeRider
from lightning_nested.dynamics.maps import recorded
from lightning_nested.games import (
    Game,
    GaussiansGAN,
    IteratedPrisonersDilemma,
    MatchingPennies,
    PenniesAndDilemma,
    RandomSubspace,
    SmallIPD,
)

Players = tuple[Tensor, ...]
# game, learning rate, steps of plain gradient and LOLA
GAMES: dict[str, tuple[Game, float, int]] = {
    "matching pennies": (MatchingPennies(), 1.0, 1000),
    "small IPD": (SmallIPD(), 4.0, 1000),
    "mix": (PenniesAndDilemma(0.9), 4.0, 1000),
    "subspace IPD": (RandomSubspace(IteratedPrisonersDilemma()), 4.0, 1000),
    "IPD": (IteratedPrisonersDilemma(), 10.0, 1000),
}


def gradients(game: Game, players: Players) -> Players:
    """Each player's gradient of its own loss."""
    values, pull = torch.func.vjp(game.losses, players)  # type: ignore[misc]
    one, zero = torch.ones_like(values[0]), torch.zeros_like(values[0])
    return pull((one, zero))[0][0], pull((zero, one))[0][1]


def plain(game: Game, rate: float, players: Players) -> Players:
    """Simultaneous gradient descent."""
    return tuple(p - rate * g for p, g in zip(players, gradients(game, players), strict=True))


def lola(game: Game, rate: float, players: Players) -> Players:
    """Exact LOLA, one step of look-ahead for each player."""
    first, second = players

    def ahead_of_second(x: Tensor) -> Tensor:
        return game.losses((x, second - rate * gradients(game, (x, second))[1]))[0]

    def ahead_of_first(y: Tensor) -> Tensor:
        return game.losses((first - rate * gradients(game, (first, y))[0], y))[1]

    return (
        first - rate * torch.func.grad(ahead_of_second)(first),
        second - rate * torch.func.grad(ahead_of_first)(second),
    )


def run(step: Callable[[Players], Players], starts: Sequence[Players], steps: int) -> Players:
    """All seeds at once."""
    state: Players = tuple(torch.stack(p) for p in zip(*starts, strict=True))
    advance = recorded(torch.vmap(step), state)
    with torch.no_grad():
        for _ in range(steps):
            state = tuple(advance(state))
    return state


def named(game: Game, players: Players) -> str:
    """What the players do at the end of a run: a known solution, or their losses."""
    losses = [float(v) for v in game.losses(players)]
    policies = game.policies(players)
    assert policies is not None  # of every game here
    chance = torch.cat(policies)
    if isinstance(game, MatchingPennies):
        if float((chance - 0.5).abs().max()) < 0.02:
            return "equilibrium"
    elif isinstance(game, PenniesAndDilemma):
        if float(chance.min()) > 0.9 or float(chance.max()) < 0.1:
            return "cooperation" if float(chance.min()) > 0.9 else "defection"
    elif max(losses) < 1.05:
        return "cooperation"
    elif min(losses) > 1.9 and max(losses) < 2.06:
        return "defection"
    return "(" + ", ".join(f"{v + 0.0:.1f}" for v in losses) + ")"


def counted(sets: Sequence[set[str]], most: int = 6) -> str:
    """Kinds of solutions with the number of seeds, the most frequent first, known ones before losses."""
    counts = Counter(kind for kinds in sets for kind in kinds)
    order = sorted(counts, key=lambda kind: (kind.startswith("("), -counts[kind], kind))
    more = f", {len(order) - most} rarer ones" if len(order) > most else ""
    return ", ".join(f"{kind} {counts[kind]}" for kind in order[:most]) + more


def rider_of(game: str) -> tuple[GeneralizedRidgeRider, float]:
    """The shipped settings of the dilemma, those of the small one elsewhere."""
    config = yaml.safe_load(
        shipped_rides()["ipd" if game == "IPD" else "small_ipd"].read_text(encoding="utf-8")
    )
    options = {**config["rider"], "branching": Branching(**config["rider"]["branching"])}
    options["distances"] = tuple(options.get("distances", [1.0]))
    return GeneralizedRidgeRider(**options), float(config["optimizer"]["init_args"]["lr"])


def ridden(name: str, game: Game, starts: Sequence[Players]) -> tuple[list[set[str]], str, dict[str, Any]]:
    """Solutions below the points of every start, in how many a single point leads to both, and the losses."""
    rider, rate = rider_of(name)
    began = time.process_time()
    tree = rider.ride(game.losses, starts, partial(SGD, lr=rate))
    seconds = time.process_time() - began
    kinds: list[set[str]] = [set() for _ in starts]
    both: set[int] = set()
    for root in tree.roots:
        start = int(root.name.split(".")[0])
        below = {named(game, b.tensors(starts[0])) for b in tree.below(root.name) if b.finite}
        kinds[start] |= below
        if {"cooperation", "defection"} <= below:
            both.add(start)
    more = {
        f"{name} / rider": {
            r.name: [s.losses for s in tree.solutions(tree.below(r.name))] for r in tree.roots
        },
        f"{name} / rider seconds": seconds,
    }
    return kinds, "-" if isinstance(game, MatchingPennies) else str(len(both)), more


def games(arguments: argparse.Namespace) -> dict[str, Any]:
    """The table of solutions."""
    results: dict[str, Any] = {}
    rows = []
    for name in arguments.games:
        game, rate, steps = GAMES[name]
        starts = [
            tuple(p.detach() for p in game.initial(torch.Generator().manual_seed(s)))
            for s in range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        ]
        found: dict[str, list[set[str]]] = {}
        for method, step in (("plain", plain), ("LOLA", lola)):
            ends = run(partial(step, game, rate), starts, steps)
            players = [tuple(e[i] for e in ends) for i in range(arguments.seeds)]
            found[method] = [{named(game, p)} for p in players]
            results[f"{name} / {method}"] = [[float(v) for v in game.losses(p)] for p in players]
        both = dict.fromkeys(found, "-")
        if not arguments.no_rider:
            found["rider"], both["rider"], more = ridden(name, game, starts)
            results |= more
        rows += [[name, method, counted(sets), both[method]] for method, sets in found.items()]
    print_table(["game", "method", "seeds in which it was found", "both from one start"], rows)
    return results


def wells() -> dict[str, Any]:
    """All minima from one saddle."""
    rows, results = [], {}
    for d in range(2, 7):
        generator = torch.Generator().manual_seed(d)
        turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
        weight = torch.linspace(1, 2, d, dtype=torch.float64)

        def loss(w: Players, turn: Tensor = turn, weight: Tensor = weight) -> Tensor:
            y = turn @ w[0]
            return (weight * (y**2 - 1) ** 2).sum() + 0.05 * y.prod()

        saddle = (torch.zeros(d, dtype=torch.float64),)
        tree = RidgeRider(descent_rate=0.03).ride(loss, saddle, behaviour=lambda w, turn=turn: turn @ w[0])
        results[f"2^{d} minima"] = len(tree.solutions())
        rows.append([str(d), str(2**d), str(len(tree.solutions())), str(len(tree.branches) - 1)])
    print_table(["d", "minima", "found", "ridges followed"], rows)
    return results


def gan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Mode sets that the branches of a small GAN end with."""
    rows, results = [], {}
    for seed in range(arguments.gan_seeds):
        game = GaussiansGAN((8,), noise_dim=2, batch_size=64, num_modes=4, std=0.2)

        def shares(players: Players, game: GaussiansGAN = game) -> Tensor:
            samples = game.samples(players, 1000, torch.Generator().manual_seed(1))
            distance, mode = torch.cdist(samples, game.centres.to(samples)).min(1)
            counts = torch.bincount(mode[distance < 3 * game.std], minlength=len(game.centres))
            return (counts > 50).double()

        players = tuple(p.detach() for p in game.initial(torch.Generator().manual_seed(seed)))
        rider = GeneralizedRidgeRider(
            branching=Branching(horizon=10, ascent_steps=5, ascent_rate=0.03),
            num_directions=2,
            distances=(1.0, 3.0),
            ride_steps=1000,
            tolerance=0.5,
        )
        tree: RideTree = rider.ride(game.losses, [players], partial(Adam, lr=0.02), behaviour=shares)
        sets = [
            "{" + ",".join(str(i) for i, v in enumerate(s.behaviour) if v) + "}" for s in tree.solutions()
        ]
        rows.append([str(seed), f"{tree.roots[0].exponents[0]:.3f}", str(len(tree.leaves)), " ".join(sets)])
        results[f"GAN {seed}"] = [s.behaviour for s in tree.solutions()]
    print_table(["seed", "top exponent", "branches", "sets of modes covered"], rows)
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--first_seed", type=int, default=0)
    options.add_argument("--games", nargs="*", default=list(GAMES), choices=list(GAMES))
    options.add_argument("--gan_seeds", type=int, default=5)
    options.add_argument("--no_rider", action="store_true", help="plain gradient and LOLA only")
    options.add_argument("--no_wells", action="store_true")
    arguments = options.parse_args(argv)
    start(arguments)
    before = load()
    results = games(arguments) if arguments.games else {}
    if not arguments.no_wells:
        results |= wells()
    if arguments.gan_seeds:
        results |= gan(arguments)
    report(arguments, results, load_before=before)
    return results


if __name__ == "__main__":
    main()
