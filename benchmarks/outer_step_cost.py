"""What an outer step of a small network costs beside the products of its solve.

The network, the data and the trainer of ``callback_cost.py``: 2 410 weights, a batch of 16, an outer step after every
inner one, five terms of the series at the current weights. The parts of the callback's hooks are timed inside one fit:
the solve, the outer loss with its gradient, the training gradient with its graph, and all else. For comparison, a plain
step of the same fit without callback, and the plain functions: an outer gradient, a gradient with its graph and five
products, without a Trainer.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from _measuring import Spread, load, parser, print_table, report, start
from callback_cost import Model, microseconds
from torch import nn

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.callbacks.hypergradient import outer_step
from lightning_nested.hypergradient import Current, Neumann, implicit
from lightning_nested.hyperparameters import OuterStep, WeightDecay
from lightning_nested.linalg.solvers.base import InverseSolver


@contextmanager
def timed(owner: Any, name: str, times: list[float]) -> Iterator[None]:
    """Keep the CPU time of every call of a function."""
    function: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        begin = time.process_time()
        try:
            return function(*args, **options)
        finally:
            times.append(1e3 * (time.process_time() - begin))

    with patch.object(owner, name, call):
        yield


def functions() -> float:
    """Return the milliseconds of what any implementation must compute."""
    torch.manual_seed(0)
    net = Model().network
    params = tuple(net.parameters())
    x, y = torch.rand(16, 64), torch.randint(0, 10, (16,))
    begin = time.process_time()
    b = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), params)
    gradient = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), params, create_graph=True)
    for _ in range(5):
        b = torch.autograd.grad(gradient, params, b, retain_graph=True)
    return 1e3 * (time.process_time() - begin)


def main(argv: Sequence[str] | None = None) -> dict[str, Spread]:
    options = parser(__doc__, rounds=5)
    options.add_argument("--steps", type=int, default=300)
    arguments = options.parse_args(argv)
    start(arguments)
    before = load()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    parts: dict[str, list[float]] = {
        name: []
        for name in (
            "an outer step",
            "its solve",
            "outer loss and gradient",
            "training gradient with its graph",
            "step of the outer optimizer",
            "all else",
        )
    }
    plain, least = [], []
    for _ in range(arguments.rounds):
        callback = HypergradientCallback(
            WeightDecay(per="tensor", init=1e-4, include=["*"]),
            at=Current(),
            solver=Neumann(num_terms=5, step_size=0.1),
            every_n_steps=1,
            warmup_steps=0,
        )
        taken: list[list[float]] = [[] for _ in range(5)]
        with (
            timed(outer_step, "find_hypergradient", taken[0]),
            timed(InverseSolver, "solve", taken[1]),
            timed(outer_step, "evaluate_outer", taken[2]),
            timed(implicit, "_linearize", taken[3]),
            timed(OuterStep, "apply", taken[4]),
        ):
            microseconds([callback], arguments.steps, time.process_time)
        # Without the first steps and their checks.
        found, solve, outer, graph, apply = (times[20:] for times in taken)
        whole = [a + b for a, b in zip(found, apply, strict=True)]
        known = (solve, outer, graph, apply)
        rest = [all_ - sum(each) for all_, *each in zip(whole, *known, strict=True)]
        for name, values in zip(parts, (whole, *known, rest), strict=True):
            parts[name].append(statistics.median(values))
        plain.append(1e-3 * microseconds([], arguments.steps, time.process_time))
        least.append(statistics.median(functions() for _ in range(100)))
    results = {name: Spread.of(values) for name, values in parts.items()}
    results |= {"a plain step of the fit": Spread.of(plain), "the functions alone": Spread.of(least)}
    print_table(["", "ms [quartiles]"], [[name, spread.text()] for name, spread in results.items()])
    report(arguments, results, load_before=before)
    return results


if __name__ == "__main__":
    main()
