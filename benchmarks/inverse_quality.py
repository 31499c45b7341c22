"""How good each approximation of the inverse Hessian is through a training, for what it costs: linear model and MLP.

A linear softmax and an MLP learn breast cancer (scikit-learn's 30 columns) on whole batches in float64, with one fixed
decay per weight. After some steps the exact answer at these weights, −H⁻¹v times the decays and weights, is found by a
written-out Hessian, and each approximation is compared with it: its relative error, its cosine, and its cost in
gradients of the training loss (a product with H costs two, an unrolled step three).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _fits import quiet
from _measuring import Spread, load, parser, print_table, report, start
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_nested import TabularDataModule
from lightning_nested.figures.style import COLOURS, GREY, open_axes, styled_figure
from lightning_nested.files import replace_figure
from lightning_nested.hypergradient.unrolled import unrolled_hypergradient
from lightning_nested.linalg.kronecker import KroneckerFisher
from lightning_nested.linalg.operators import as_operator
from lightning_nested.linalg.solvers import ConjugateGradient, Neumann, Nystrom

DECAY, RATE = 1e-2, 0.1
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(30, 2),
    "MLP": lambda: nn.Sequential(nn.Linear(30, 12), nn.Tanh(), nn.Linear(12, 2)),
}
# Damping relative to the mean of the Fisher information's diagonal.
DAMPINGS = (0.0, 0.03, 0.3)
PRODUCT, UNROLLED = 2.0, 3.0
# 1 − cosine below which an answer counts as exact in the figure.
SMALLEST = 1e-4
Point = tuple[str, float, Tensor]  # method, cost, approximation of H⁻¹v


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return one vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


class Problem:
    """A network in training, with all that is exact at its current weights."""

    def __init__(self, name: str, seed: int) -> None:
        seed_everything(seed, verbose=False)
        data = TabularDataModule("breast_cancer", train_size=200, val_size=150, seed=seed)
        data.setup()
        self.train = (data.train_inputs.double(), data.train_target)
        self.val = (data.val_inputs.double(), data.val_target)
        self.network = NETWORKS[name]().double()
        self.named = dict(self.network.named_parameters())
        self.weights = tuple(self.named.values())
        self.fisher = KroneckerFisher(self.network, self.named)
        self.optimizer = torch.optim.SGD(self.weights, lr=RATE, momentum=0.9)

    def pieces(self, w: Tensor) -> list[Tensor]:
        """Return a vector as tensors of the weights' shapes."""
        parts = w.split([p.numel() for p in self.weights])
        return [part.view_as(p) for part, p in zip(parts, self.weights, strict=True)]

    def loss(self, w: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy at weights given as one vector."""
        named = dict(zip(self.named, self.pieces(w), strict=True))
        return cross_entropy(torch.func.functional_call(self.network, named, (data[0],)), data[1])

    def step(self) -> None:
        """Make a step on the decayed training loss; its backward pass gives the Kronecker factors."""
        self.optimizer.zero_grad()
        with self.fisher.observing():
            cross_entropy(self.network(self.train[0]), self.train[1]).backward()  # type: ignore[no-untyped-call]
        self.fisher.update(1.0)
        for p in self.weights:
            assert p.grad is not None
            p.grad.add_(p.detach(), alpha=DECAY)
        self.optimizer.step()

    def approximations(self, budgets: Sequence[int], matrix: Tensor, v: Tensor) -> Iterator[Point]:
        """Yield what each method makes of H⁻¹v, with H the Hessian with decays."""
        w = flat(self.weights)
        operator = as_operator(matrix, (v,))
        # The decays are the damping of Nyström, whose low rank is for the rest.
        plain = as_operator(matrix - DECAY * torch.eye(len(w), dtype=w.dtype), (v,))
        gradient = torch.func.grad(self.loss)(w, self.train) + DECAY * w
        top = float(torch.linalg.eigvalsh(matrix).abs().max())
        yield "identity", 0.0, v
        yield "gradient's outer product, 20 terms", 0.0, outer_product(gradient, v, 20, 1 / top)
        for damping in DAMPINGS:
            fisher = DECAY + damping * self.fisher.mean_diagonal()
            inverse = self.fisher.inverse([fisher] * len(self.weights))
            yield f"Kronecker-factored, ρ = {damping:g}", 0.0, flat(inverse @ tuple(self.pieces(v)))
        for budget in budgets:
            solvers: dict[str, Any] = {
                "Neumann": Neumann(num_terms=budget, step_size=1 / top),
                "CG": ConjugateGradient(max_iterations=budget, tolerance=0.0),
                "Nyström": Nystrom(rank=budget, damping=DECAY),
            }
            for name, solver in solvers.items():
                low_rank = isinstance(solver, Nystrom)
                try:
                    found = solver.solve(plain if low_rank else operator, (v,))
                except FloatingPointError:  # negative curvature: a run would skip this outer step
                    yield name, PRODUCT * budget, torch.full_like(v, torch.nan)
                    continue
                # One product of Nyström's only checks its answer.
                yield name, PRODUCT * float(found.iterations - low_rank), found.x[0]
            yield "unrolled", UNROLLED * budget, self.unrolled(w, budget, 1 / top)

    def unrolled(self, w: Tensor, steps: int, rate: float) -> Tensor:
        """Return x for which −x·d·w is the derivative through so many further steps from these weights."""
        logs = torch.full_like(w, DECAY).log().requires_grad_()

        def move(params: Any, hparams: Any, t: int) -> Any:
            (current,) = params
            slope = torch.func.grad(self.loss)(current, self.train) + hparams[0].exp() * current
            return (current - rate * slope,)

        (found,) = unrolled_hypergradient(
            move, lambda params, _: self.loss(params[0], self.val), (w,), (logs,), num_steps=steps
        )
        return -found / (DECAY * w)


def outer_product(gradient: Tensor, v: Tensor, terms: int, rate: float) -> Tensor:
    """Return the Neumann series with g·gᵀ in place of the Hessian, as in code of the authors; 0 terms: the identity."""
    x = p = v
    for _ in range(terms):
        p = p - rate * gradient * (gradient @ p)
        x = x + p
    return rate * x


def along(name: str, seed: int, marks: Sequence[int], budgets: Sequence[int]) -> list[dict[str, Any]]:
    """Return error and cosine of each method after so many steps."""
    problem, found = Problem(name, seed), []
    for step in range(max(marks) + 1):
        if step in marks:
            found.append({"step": step, **measured(problem, budgets)})
        problem.step()
    return found


def measured(problem: Problem, budgets: Sequence[int]) -> dict[str, Any]:
    """Return what is exact at the current weights, and each method's cost, error and cosine."""
    w = flat(problem.weights)
    matrix = torch.func.hessian(problem.loss)(w, problem.train) + DECAY * torch.eye(len(w), dtype=w.dtype)
    v = torch.func.grad(problem.loss)(w, problem.val)
    exact = torch.linalg.solve(matrix, v) * w
    values = torch.linalg.eigvalsh(matrix)
    methods: dict[str, list[tuple[float, float, float]]] = {}
    for method, cost, x in problem.approximations(budgets, matrix, v):
        answer = x * w
        error = float((answer - exact).norm() / exact.norm())
        cosine = float(answer @ exact / answer.norm() / exact.norm())
        methods.setdefault(method, []).append((cost, error, cosine))
    return {
        "loss": float(problem.loss(w, problem.train)),
        "smallest": float(values[0] / values[-1]),
        "methods": methods,
    }


def draw(path: Path, results: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Draw 1 − cosine against cost, a row for each network and a panel for each point of the training."""
    marks = [entry["step"] for entry in next(iter(results.values()))[0]]
    with styled_figure(2.9 * len(marks), 2.7 * len(results) + 0.9, dpi=110, layout="constrained") as figure:
        panels = figure.subplots(len(results), len(marks), sharex=True, sharey=True, squeeze=False)
        for k, (name, seeds) in enumerate(results.items()):
            for i, panel in enumerate(panels[k]):
                draw_methods(panel, [seed[i]["methods"] for seed in seeds])
                below = "cost in gradients" if k == len(results) - 1 else ""
                open_axes(panel, f"{name}, {marks[i]} steps", below, "1 − cosine" if i == 0 else "")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", frameon=False, fontsize=9, ncols=len(labels)
        )
        replace_figure(path, figure)


def draw_methods(panel: Any, entries: Sequence[dict[str, list[tuple[float, float, float]]]]) -> None:
    """Draw the medians over seeds: lines for what has a budget, marks for what costs nothing."""

    def median(name: str, j: int, part: int) -> float:
        return Spread.of([entry[name][j][part] for entry in entries]).median

    for colour, name in zip(COLOURS, ("Neumann", "unrolled", "CG", "Nyström"), strict=False):
        count = range(len(entries[0][name]))
        gaps = [max(1 - median(name, j, 2), SMALLEST) for j in count]
        panel.plot(
            [median(name, j, 0) for j in count], gaps, color=colour, marker="o", ms=3, lw=1.5, label=name
        )
    for name, colour, mark, label in (
        ("identity", GREY, "*", "identity"),
        ("Kronecker-factored, ρ = 0.03", COLOURS[4], "s", "Kronecker-factored"),
        ("gradient's outer product, 20 terms", "black", "x", "gradient's outer product"),
    ):
        panel.plot([1.0], [1 - median(name, 0, 2)], color=colour, marker=mark, ms=6, ls="", label=label)
    panel.set(xscale="log", yscale="log", ylim=(0.5 * SMALLEST, 2.0))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, draw the figure."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--marks", type=int, nargs="+", default=[10, 100, 1000, 5000])
    options.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50])
    options.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options.add_argument("--figure", type=Path, default=None)
    arguments = options.parse_args(argv)
    start(arguments)
    quiet()
    before = load()
    results = {
        name: [along(name, 10 + seed, arguments.marks, arguments.budgets) for seed in range(arguments.rounds)]
        for name in arguments.only
    }
    for name, seeds in results.items():
        show(name, seeds, arguments.budgets)
    print(f"load {before} to {load()}")
    if arguments.figure is not None:
        draw(arguments.figure, results)
    report(arguments, results, packages=("scikit-learn",), load_before=before)
    return results


def show(name: str, seeds: Sequence[list[dict[str, Any]]], budgets: Sequence[int]) -> None:
    """Print cosine and relative error of each method at each point of the training."""
    steps = [entry["step"] for entry in seeds[0]]
    smallest = [Spread.of([seed[i]["smallest"] for seed in seeds]).text(4) for i in range(len(steps))]
    print(f"\n{name}: smallest / largest eigenvalue of H by steps: {dict(zip(steps, smallest, strict=True))}")
    rows = []
    for method, points in seeds[0][0]["methods"].items():
        for j in range(len(points)):
            cells = []
            for i in range(len(steps)):
                found = [seed[i]["methods"][method][j] for seed in seeds]
                error = Spread.of([f[1] for f in found]).median
                cells.append(f"{Spread.of([f[2] for f in found]).text(2)}, {error:.2g}")
            rows.append([method, str(budgets[j]) if len(points) > 1 else "", *cells])
    print_table(["method", "budget", *(f"{step} steps: cosine, error" for step in steps)], rows)


if __name__ == "__main__":
    main()
