"""Returns of the actor-critic on CartPole, over seeds.

    python scripts/cartpole_seeds.py --seeds 20 21 22 23 24 25 26 27 28 29 --method "0.5 at 0.5π"

Networks, losses and rates are those of the configuration ``cartpole``, a rate for each player; all seeds train side by
side. Prints after every 100 updates the median, the least and the largest mean return of the last 100 episodes, and how
many seeds have 200.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from _actor_critic_game import ActorCriticGame
from _network_games import step
from _running import script_parser
from which_momentum import methods

RATES = {"actor": 1e-3, "critic": 1e-2}


def main(argv: Sequence[str] | None = None) -> list[list[float]]:
    """Train, print the table; return the mean returns of the seeds after every 100 updates."""
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10, 20)))
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument(
        "--method", choices=methods(()), default="Adam, β₁ = 0", help="its rates are in Adam's units"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    began, found = time.process_time(), []
    game = ActorCriticGame(options.seeds)
    make, _ = methods(())[options.method]
    optimizers = {n: make(p, RATES[n]) for n, p in game.players.items()}
    print(
        "| updates | mean return of the last 100 episodes | seeds at 200 or more |",
        "| --- | --- | --- |",
        sep="\n",
    )
    for update in range(1, options.updates + 1):
        step(game, optimizers)
        if update % 100 == 0 or update == options.updates:
            found.append(game.scores())
            middle, least, most = (f(found[-1]) for f in (statistics.median, min, max))
            good = sum(score >= 200 for score in found[-1])
            print(
                f"| {update} | {middle:.0f} [{least:.0f}, {most:.0f}] | {good} of {len(options.seeds)} |",
                flush=True,
            )
    print(f"\n{time.process_time() - began:.0f} s of CPU")
    return found


if __name__ == "__main__":
    main()
