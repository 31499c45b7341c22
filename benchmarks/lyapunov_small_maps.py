"""What a step of ``lyapunov_spectrum`` costs on small maps: as it is, and with ``compile=True``.

CPU time of one step, its tangents and its orthonormalisation: the difference of a long and a short run, divided by the
steps between them, so that recording and compiling are not in it; those are the seconds of the short run.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from _measuring import Spread, load, parser, print_table, report, start
from torch import Tensor

from lightning_nested.dynamics import lyapunov_spectrum, rk4_step


def henon(x: Tensor) -> Tensor:
    """Hénon's map."""
    return torch.stack([1 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0]])


def lorenz(x: Tensor) -> Tensor:
    """Lorenz's field."""
    return torch.stack([10 * (x[1] - x[0]), x[0] * (28 - x[2]) - x[1], x[0] * x[1] - 8 / 3 * x[2]])


MAPS: dict[str, tuple[Any, list[float]]] = {
    "logistic map": (lambda x: 4 * x * (1 - x), [0.3]),
    "Hénon": (henon, [0.1, 0.1]),
    "Lorenz, RK4": (rk4_step(lorenz, 0.02), [1.0, 2.0, 25.0]),
}


def seconds(step: Any, x0: Tensor, num_steps: int, **options: Any) -> float:
    """CPU time of a run."""
    begin = time.process_time()
    lyapunov_spectrum(step, x0, num_steps=num_steps, **options)
    return time.process_time() - begin


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the figures by map."""
    options = parser(__doc__, rounds=5)
    options.add_argument(
        "--steps", type=int, default=1000, help="steps between the long run and the short one"
    )
    options.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = options.parse_args(arguments)
    start(args)
    before = load()
    results: dict[str, Any] = {}
    kinds: dict[str, dict[str, bool]] = {"plain": {}} | (
        {"compiled": {"compile": True}} if args.compile else {}
    )
    for name, (step, point) in MAPS.items():
        x0 = torch.tensor(point, dtype=torch.float64)
        for kind, chosen in kinds.items():
            seconds(step, x0, 40, **chosen)
            shorts, costs = [], []
            # Compiling takes seconds, which differ from run to run; ten times as many steps outweigh that.
            between = args.steps * (10 if chosen else 1)
            for _ in range(args.rounds):
                short, long = (seconds(step, x0, n, **chosen) for n in (40, 40 + between))
                shorts.append(short)
                costs.append((long - short) / between * 1e3)
            results[f"{name}, {kind}"] = {"ms": Spread.of(costs), "setup": Spread.of(shorts)}
    rows = [[name, entry["ms"].text(3), entry["setup"].text(2)] for name, entry in results.items()]
    print_table(["map", "ms a step", "first 40 steps, s"], rows)
    report(args, results, load_before=before)
    return results


if __name__ == "__main__":
    main()
