"""What the memory of one hypergradient of a million decays depends on: terms, inner steps, number of decays.

The MLP 784-1000-215-10 of ``million_decays.py``, a million weights. Memory is the most bytes of tensors alive at once
that the hypergradient allocates itself, weights and decays not included. Unrolling keeps what each step needs; the
implicit hypergradient looks at the last weights only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from _measuring import live_memory, load, parser, print_table, report, start
from _problem import Problem
from torch import Tensor, nn
from unrolling import contestants

from lightning_nested.figures.style import BLUE, GREEN, ORANGE, open_axes, styled_figure
from lightning_nested.files import replace_figure
from lightning_nested.hypergradient import Neumann
from lightning_nested.hypergradient.implicit import implicit_result
from lightning_nested.hyperparameters import WeightDecay

WIDTHS, BATCH = (784, 1000, 215, 10), 64
STEPS, TERMS = (5, 10, 20, 50, 100), (0, 5, 10, 20, 50)
KINDS: tuple[Literal["model", "tensor", "parameter"], ...] = ("model", "tensor", "parameter")
# Contestants of unrolling.py that are shown over inner steps.
OVER_STEPS = {
    "ours, full graph": "unrolled",
    "ours, checkpoint=20": "unrolled, checkpointed",
    "ours, implicit (Neumann 20)": "implicit, 20 terms",
}
Curves = dict[str, dict[int, float]]  # MiB by name and by what varies


def implicit(
    problem: Problem, terms: int, per: Literal["model", "tensor", "parameter"]
) -> Callable[[], object]:
    """Return the implicit hypergradient with so many terms, of one decay, one per tensor or one per weight."""
    decay = WeightDecay(per=per, init=0.5, include=["*"])
    decay.build(problem.named)

    def call() -> Sequence[Tensor]:
        return implicit_result(
            nn.functional.cross_entropy(problem.network(problem.inputs), problem.labels),
            problem.outer_loss(),
            problem.params,
            (),
            solver=Neumann(num_terms=terms, step_size=problem.step_size),
            penalties=[decay.linearize(problem.named)],
        ).penalties

    return call


def measured(problem: Problem, steps: Sequence[int], terms: Sequence[int]) -> dict[str, Curves]:
    """Return MiB by what varies: inner steps, terms, number of decays."""
    tensors, weights = len(problem.params), sum(p.numel() for p in problem.params)
    found: dict[str, Curves] = {"inner steps": {name: {} for name in OVER_STEPS.values()}}
    for count in steps:
        calls = contestants(problem, count, 0.1)
        for key, name in OVER_STEPS.items():
            found["inner steps"][name][count] = live_memory(calls[key]) / 2**20
    by_terms = {count: live_memory(implicit(problem, count, "parameter")) / 2**20 for count in terms}
    counts = dict(zip(KINDS, (1, tensors, weights), strict=True))
    by_count = {counts[per]: live_memory(implicit(problem, 20, per)) / 2**20 for per in KINDS}
    return {**found, "terms": {"implicit": by_terms}, "decays": {"implicit, 20 terms": by_count}}


def figure(path: Path, found: dict[str, Curves]) -> None:
    """Draw memory over each of the three."""
    colours = dict(zip(OVER_STEPS.values(), (ORANGE, GREEN, BLUE), strict=True))
    titles = {
        "inner steps": "Inner steps: only unrolling grows",
        "terms": "Terms of the series",
        "decays": "Number of decays",
    }
    with styled_figure(12.5, 3.9, layout="constrained") as drawn:
        axes = drawn.subplots(1, 3, sharey=True)
        for axis, (kind, curves) in zip(axes, found.items(), strict=True):
            open_axes(axis, titles[kind], kind, "MiB of one hypergradient" if axis is axes[0] else "")
            for name, points in curves.items():
                axis.plot(points.keys(), points.values(), "o-", color=colours.get(name, BLUE), label=name)
            axis.set_yscale("log")
            if kind != "terms":
                axis.set_xscale("log")
            axis.legend()
        replace_figure(path, drawn, dpi=110)


def main(given: Sequence[str] | None = None) -> dict[str, Curves]:
    """Measure, print and draw; return MiB by what varies."""
    options = parser(__doc__, rounds=1)
    options.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    options.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    options.add_argument("--terms", type=int, nargs="+", default=list(TERMS))
    options.add_argument("--figure", type=Path, help="PNG file to draw")
    arguments: argparse.Namespace = options.parse_args(given)
    start(arguments)
    before = load()
    found = measured(Problem(arguments.widths, BATCH), arguments.steps, arguments.terms)
    rows = [
        [kind, name, "; ".join(f"{count}: {size:.1f}" for count, size in points.items())]
        for kind, curves in found.items()
        for name, points in curves.items()
    ]
    print_table(["what varies", "hypergradient", "MiB"], rows)
    if arguments.figure is not None:
        figure(arguments.figure, found)
    report(arguments, found, load_before=before)
    return found


if __name__ == "__main__":
    main()
