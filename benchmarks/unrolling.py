"""Differentiating through 100 SGD steps: memory and time of the full graph, of checkpointing, and of neither.

The MLP and the decays of one_hypergradient; higher keeps every step's graph, as ours does by default; with
``checkpoint=True`` ours stores some states and runs steps again; implicit differentiation looks at the last
weights only, so that its memory does not depend on the number of steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from _measuring import interleave, live_memory, load, parser, print_table, report, start
from _problem import Hypergradient, Problem
from one_hypergradient import compare
from torch import nn

from lightning_nested.hypergradient import Neumann
from lightning_nested.hypergradient.implicit import implicit_result
from lightning_nested.hypergradient.unrolled import unrolled_hypergradient


def step(problem: Problem, rate: float, params: Hypergradient, decays: Hypergradient) -> Hypergradient:
    """One SGD step on cross-entropy and decay, differentiable."""
    logits = problem.functional(params, problem.inputs)
    loss = nn.functional.cross_entropy(logits, problem.labels) + problem.penalty(params, decays)
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    return tuple(p - rate * g for p, g in zip(params, gradient, strict=True))


def outer_loss(problem: Problem, params: Hypergradient) -> torch.Tensor:
    """Cross-entropy on the other batch."""
    return nn.functional.cross_entropy(problem.functional(params, problem.outer_inputs), problem.outer_labels)


def contestants(problem: Problem, steps: int, rate: float) -> dict[str, Callable[[], Hypergradient]]:
    """Hypergradients of 648 010 decays through ``steps`` steps from the same start."""

    def unrolled(checkpoint: bool | int | str) -> Hypergradient:
        return unrolled_hypergradient(
            lambda params, decays, t: step(problem, rate, params, decays),
            lambda params, decays: outer_loss(problem, params),
            problem.params,
            problem.decays,
            num_steps=steps,
            checkpoint=checkpoint,  # type: ignore[arg-type]
        )

    def implicit() -> Hypergradient:
        params = problem.params
        for _ in range(steps):
            params = tuple(p.detach().requires_grad_() for p in step(problem, rate, params, problem.decays))
        named = dict(zip(problem.named, params, strict=True))
        inner = nn.functional.cross_entropy(problem.functional(params, problem.inputs), problem.labels)
        return implicit_result(
            inner,
            outer_loss(problem, params),
            params,
            (),
            solver=Neumann(num_terms=20, step_size=rate),
            penalties=[problem.weight_decay.linearize(named)],
        ).penalties[0]

    def higher_steps() -> Hypergradient:
        import higher

        optimizer = torch.optim.SGD(problem.network.parameters(), lr=rate)
        with higher.innerloop_ctx(problem.network, optimizer) as (network, inner):
            for _ in range(steps):
                loss = nn.functional.cross_entropy(network(problem.inputs), problem.labels)
                inner.step(loss + problem.penalty(tuple(network.parameters()), problem.decays))
            outer = nn.functional.cross_entropy(network(problem.outer_inputs), problem.outer_labels)
            return torch.autograd.grad(outer, problem.decays)

    result: dict[str, Callable[[], Hypergradient]] = {"ours, full graph": lambda: unrolled(False)}
    if find_spec("higher") is not None:
        result["higher, full graph"] = higher_steps
    result["ours, checkpoint=True"] = lambda: unrolled(True)
    result["ours, checkpoint=20"] = lambda: unrolled(20)
    result["ours, checkpoint=25"] = lambda: unrolled(25)
    result['ours, checkpoint="sqrt"'] = lambda: unrolled("sqrt")
    result["ours, implicit (Neumann 20)"] = implicit
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, object]]:
    options = parser(__doc__, rounds=7)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--rate", type=float, default=0.1)
    options.add_argument("--widths", type=int, nargs="+", default=[784, 500, 500, 10])
    options.add_argument("--batch", type=int, default=256)
    arguments: argparse.Namespace = options.parse_args(argv)
    start(arguments)
    before = load()
    problem = Problem(arguments.widths, arguments.batch)
    calls = contestants(problem, arguments.steps, arguments.rate)
    full = "ours, full graph"
    reference = tuple(g.double() for g in calls[full]())
    errors = {name: compare(call(), reference) for name, call in calls.items()}
    memory = {name: live_memory(call) for name, call in calls.items()}
    half = contestants(problem, arguments.steps // 2, arguments.rate)
    memory_half = {name: live_memory(call) for name, call in half.items()}
    # The unit here is the full graph itself: each contestant right after it.
    times = interleave(
        calls, {"full": calls[full]}, rounds=arguments.rounds, threads=arguments.threads, warmup=1, repeats=1
    )
    results: dict[str, dict[str, object]] = {}
    rows = []
    for name in calls:
        error, cosine = errors[name]
        rows.append(
            [
                name,
                f"{memory[name] / 2**20:.0f}",
                f"{memory_half[name] / 2**20:.0f}",
                f"{times[name].seconds.median:.2f}",
                times[name].units["full"].text(),
                f"{error:.1e}",
                f"{cosine:.4f}",
            ]
        )
        results[name] = {
            "memory_mib": memory[name] / 2**20,
            "memory_mib_half_the_steps": memory_half[name] / 2**20,
            "seconds": times[name].seconds,
            "time_over_full_graph": times[name].units["full"],
            "error_to_full_graph": error,
            "cosine_to_full_graph": cosine,
        }
    print_table(
        [
            "contestant",
            f"MiB, {arguments.steps} steps",
            f"MiB, {arguments.steps // 2} steps",
            "s",
            "time / full graph [quartiles]",
            "relative difference",
            "cosine",
        ],
        rows,
    )
    print("\nReach: checkpointed <= 75 MiB at <= 1.8 x the time of the full graph.")
    report(arguments, results, packages=("higher",), load_before=before)
    return results


if __name__ == "__main__":
    main()
