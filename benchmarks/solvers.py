"""Which solver to take: products to 1 % on a quadratic, and error against cost along a training run.

First a quadratic of condition 32: products until the relative error of x is 1 %. Then an MLP with one decay
per weight trains on real digits in float64, small enough to write its Hessian out; at every outer step each
solver's answer is compared with the dense one, warm-started from its own previous answer and not. An extra
product for a step size or a warm start is counted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _measuring import Spread, load, parser, print_table, report, start
from torch import Tensor, nn

from lightning_nested.files import replace_figure
from lightning_nested.hypergradient import (
    ConjugateGradient,
    GaussNewton,
    Hessian,
    Identity,
    InverseSolver,
    Neumann,
    Nystrom,
    SolverState,
)
from lightning_nested.hypergradient.implicit import implicit_result
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.hyperparameters.transforms import Exp
from lightning_nested.linalg.operators import as_operator


def products_to(error: float, make: Any, size: int = 32, condition: float = 32.0) -> int:
    """Fewest products after which ‖x − A⁻¹b‖ ≤ error·‖A⁻¹b‖; equally spaced eigenvalues in [1, condition]."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    eigenvalues = torch.linspace(1.0, condition, size, dtype=torch.float64)
    matrix = basis * eigenvalues @ basis.T
    b = torch.randn(size, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(matrix, b)
    for count in range(1, 400):
        solution = make(count).solve(as_operator(matrix, (b,)), (b,))
        if torch.linalg.vector_norm(solution.x[0] - exact) <= error * torch.linalg.vector_norm(exact):
            return int(solution.iterations)
    return -1


def quadratic() -> dict[str, int]:
    """Products to 1 % for each solver; Neumann with three choices of its step."""
    top = 32.0
    return {
        "conjugate gradient": products_to(0.01, lambda k: ConjugateGradient(max_iterations=k, tolerance=0.0)),
        "Neumann, step 1/λ_max": products_to(0.01, lambda k: Neumann(num_terms=k, step_size=1 / top)),
        "Neumann, best step 2/(λ_min + λ_max)": products_to(
            0.01, lambda k: Neumann(num_terms=k, step_size=2 / (1 + top))
        ),
        "Neumann, measured step": products_to(0.01, lambda k: Neumann(num_terms=k)),
        "conjugate gradient, 200 eigenvalues in [1, 32]": products_to(
            0.01, lambda k: ConjugateGradient(max_iterations=k, tolerance=0.0), size=200
        ),
        "Nyström": products_to(0.01, lambda k: Nystrom(rank=k, damping=1e-9)),
    }


def run_solvers(budget: int) -> dict[str, InverseSolver]:
    """About ``budget`` products a solve; the warm-started ones spend one on the warm start."""
    return {
        "identity": Identity(),
        "Neumann": Neumann(num_terms=budget),
        "Neumann, warm": Neumann(num_terms=max(budget - 1, 1), warm_start=True),
        "CG": ConjugateGradient(max_iterations=budget, tolerance=0.0),
        "CG, warm": ConjugateGradient(max_iterations=max(budget - 1, 1), tolerance=0.0, warm_start=True),
        "CG, damped 0.01": ConjugateGradient(max_iterations=budget, tolerance=0.0, damping=0.01),
        "Nyström, ρ = 0.01": Nystrom(rank=max(budget - 1, 1), damping=0.01),
        "Gauss-Newton CG": ConjugateGradient(max_iterations=budget, tolerance=0.0),
        "Gauss-Newton CG, warm": ConjugateGradient(
            max_iterations=max(budget - 1, 1), tolerance=0.0, warm_start=True
        ),
    }


def training_run(
    budgets: Sequence[int], *, seed: int, steps: int, every: int, warmup: int, minibatch: int = 0
) -> tuple[dict[str, dict[int, dict[str, list[float]]]], list[tuple[float, float]]]:
    """Errors, cosines and products of every solver at every outer step, along one training."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float64) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, val = order[:400], order[400:800]
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    named = dict(network.named_parameters())
    params = tuple(named.values())
    # A floor under the decays keeps the Hessian positive definite, so that a dense solution means something.
    decay = WeightDecay(per="parameter", init=1e-2, include=["*"], transform=Exp(lower=1e-3, upper=1.0))
    decay.build(named)
    optimizer = torch.optim.SGD(params, lr=0.3, momentum=0.9)
    outer = torch.optim.Adam(list(decay.tensors.values()), lr=0.05)
    spectrum: list[tuple[float, float]] = []
    solvers = {budget: run_solvers(budget) for budget in budgets}
    states: dict[tuple[int, str], SolverState] = {}
    found: dict[str, dict[int, dict[str, list[float]]]] = {
        name: {budget: {"error": [], "cosine": [], "products": [], "failed": []} for budget in budgets}
        for name in solvers[budgets[0]]
    }
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = train
        if minibatch:
            batch = train[torch.randint(len(train), (minibatch,), generator=generator)]
        if step >= warmup and (step - warmup) % every == 0:
            exact, smallest = _dense(
                network, named, decay, images[batch], labels[batch], images[val], labels[val]
            )
            spectrum.append(smallest)
            for budget, named_solvers in solvers.items():
                for name, solver in named_solvers.items():
                    logits = network(images[batch])
                    inner = nn.functional.cross_entropy(logits, labels[batch])
                    entry = found[name][budget]
                    try:
                        result = implicit_result(
                            inner,
                            nn.functional.cross_entropy(network(images[val]), labels[val]),
                            params,
                            (),
                            solver=solver,
                            curvature=GaussNewton(outputs=logits) if "Gauss" in name else Hessian(),
                            penalties=[decay.linearize(named)],
                            state=states.get((budget, name)),
                        )
                    except FloatingPointError:  # counted: a user's run would skip this outer step
                        entry["failed"].append(1.0)
                        continue
                    states[budget, name] = result.solution.state
                    answer = _flat(result.penalties[0])
                    entry["error"].append(float((answer - exact).norm() / exact.norm()))
                    entry["cosine"].append(float(answer @ exact / answer.norm() / exact.norm()))
                    entry["products"].append(float(result.solution.iterations))
                    entry["failed"].append(0.0)
            for tensor, gradient in zip(
                decay.tensors.values(), exact.split([t.numel() for t in decay.tensors.values()]), strict=True
            ):
                tensor.grad = gradient.view_as(tensor).clone()
            outer.step()
            decay.project_()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
        decay.add_gradient_(named)
        optimizer.step()
    return found, spectrum


def _dense(
    network: nn.Module,
    named: dict[str, Any],
    decay: WeightDecay,
    x: Tensor,
    y: Tensor,
    xv: Tensor,
    yv: Tensor,
) -> tuple[Tensor, tuple[float, float]]:
    """The exact hypergradient and the extreme eigenvalues by a Hessian that torch.func writes out."""
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    sizes = [p.numel() for p in named.values()]

    def loss(w: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        pieces = [a.view_as(p) for a, p in zip(w.split(sizes), named.values(), strict=True)]
        logits = torch.func.functional_call(network, dict(zip(named, pieces, strict=True)), (inputs,))
        return nn.functional.cross_entropy(logits, targets)

    strength = _flat(tuple(d.detach() for d in decay.decays().values()))
    hessian = torch.func.hessian(loss)(flat, x, y) + torch.diag(strength)
    b = torch.func.grad(loss)(flat, xv, yv)
    exact = -torch.linalg.solve(hessian, b) * strength * flat
    eigenvalues = torch.linalg.eigvalsh(hessian)
    return exact, (float(eigenvalues[0]), float(eigenvalues[-1]))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def figure(path: Path, results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Median error against products, one line a solver, dashed where warm-started."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colors = {
        "identity": "#7f7f7f",
        "Neumann": "#1f77b4",
        "CG": "#d62728",
        "CG, damped 0.01": "#ff7f0e",
        "Nyström, ρ = 0.01": "#2ca02c",
        "Gauss-Newton CG": "#9467bd",
    }
    fig, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), sharex=True)
    for name, by_budget in results.items():
        points = [(e["products"].median, e["error"], e["cosine"]) for e in by_budget.values() if e["error"]]
        if not points:
            continue
        warm = name.endswith(", warm")
        color = colors[name.removesuffix(", warm")]
        style: dict[str, Any] = {
            "color": color,
            "linestyle": "--" if warm else "-",
            "marker": "o",
            "markerfacecolor": "white" if warm else color,
            "markersize": 4,
            "label": "identity (no product)" if name == "identity" else name,
        }
        if name == "identity":
            style["marker"] = "*"
            style["markersize"] = 10
            points = points[:1]
        x = [max(p[0], 0.5) for p in points]
        axes[0].plot(x, [p[1].median for p in points], **style)
        axes[1].plot(x, [1 - p[2].median for p in points], **style)
        if len(points) > 1:
            axes[0].fill_between(
                x, [p[1].lower for p in points], [p[1].upper for p in points], color=color, alpha=0.08
            )
    for axis, label in zip(axes, ("relative error of the hypergradient", "1 − cosine"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="curvature products per outer step", ylabel=label)
        axis.grid(alpha=0.25, which="both", linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(1e-3, 4)
    axes[1].set_ylim(1e-5, 1.5)
    axes[0].axhline(1.0, color="black", linewidth=0.6)
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="center right", frameon=False, fontsize=9)
    fig.suptitle(
        "Along a training run on digits, against the dense solution (medians over outer steps and seeds)"
    )
    fig.tight_layout(rect=(0, 0, 0.82, 1))
    replace_figure(path, fig, dpi=130)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, rounds=5)
    options.add_argument("--budgets", type=int, nargs="+", default=[2, 5, 10, 20, 50, 100])
    options.add_argument("--steps", type=int, default=2400)
    options.add_argument("--every", type=int, default=50, help="inner steps per outer step")
    options.add_argument("--warmup", type=int, default=1500)
    options.add_argument("--minibatch", type=int, default=0, help="examples per step; 0: all 400")
    options.add_argument("--figure", type=Path, default=None)
    arguments: argparse.Namespace = options.parse_args(argv)
    start(arguments)
    before = load()
    counts = quadratic()
    print_table(["condition 32", "products to 1 %"], [[n, str(c)] for n, c in counts.items()])
    print("\nReach: CG <= 12; Neumann needs > 50.")
    runs = [
        training_run(
            arguments.budgets,
            seed=seed,
            steps=arguments.steps,
            every=arguments.every,
            warmup=arguments.warmup,
            minibatch=arguments.minibatch,
        )
        for seed in range(arguments.rounds)  # a round is a seed
    ]
    extremes = [pair for _, spectrum in runs for pair in spectrum]
    condition = Spread.of([top / bottom for bottom, top in extremes if bottom > 0] or [math.nan])
    indefinite = sum(bottom <= 0 for bottom, _ in extremes) / len(extremes)
    print(
        f"\nHessian with decay: condition {condition.text(0)}; indefinite at {indefinite:.0%} of outer steps."
    )
    results: dict[str, dict[str, dict[str, Any]]] = {}
    rows = []
    for name in runs[0][0]:
        results[name] = {}
        for budget in arguments.budgets:
            entry: dict[str, Any] = {}
            for key in ("error", "cosine", "products"):
                values = [v for run, _ in runs for v in run[name][budget][key] if math.isfinite(v)]
                entry[key] = Spread.of(values) if values else None
            failed = [v for run, _ in runs for v in run[name][budget]["failed"]]
            entry["failed"] = sum(failed) / len(failed)
            results[name][str(budget)] = entry
            if entry["error"] is None:
                rows.append([name, str(budget), "-", "-", "-", f"{entry['failed']:.0%}"])
                continue
            rows.append(
                [
                    name,
                    str(budget),
                    f"{entry['products'].median:.0f}",
                    entry["error"].text(4),
                    f"{entry['cosine'].median:.4f}",
                    f"{entry['failed']:.0%}",
                ]
            )
            if name == "identity":
                break
    print_table(["solver", "budget", "products", "relative error [quartiles]", "cosine", "refused"], rows)
    if arguments.figure is not None:
        figure(arguments.figure, results)
    report(
        arguments,
        {"quadratic": counts, "condition": condition, "indefinite": indefinite, "training": results},
        packages=("scikit-learn",),
        load_before=before,
    )
    return {"quadratic": counts, "training": results}


if __name__ == "__main__":
    main()
