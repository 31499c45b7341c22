"""Why a global hypernetwork predicts too low a validation loss: ten decays of a linear model, one per class.

Part ``ridge``: squared error on the labels as vectors. The weights of a class depend on its own decay alone, so that
the best response of a kind, and one after so many steps, have closed forms, in float64 and without any noise:

    constant, linear, ...   polynomials of the log decay, trained to the end on the training loss,
    ... by distance         the polynomial that is nearest to the optimal weights, every log decay counted alike,
    any, k steps            no limit of form, but only k steps of gradient descent from zero at each decay.

Part ``softmax``: the setting of ``hypernetwork_curves.py``, beside trainings to convergence (L-BFGS) at random decays.

Errors are predicted minus true validation loss: over all settings, and over the thirds with the weakest and the
strongest decays; the excess is the training loss above its optimum; the size, that of the weights over the optimum's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _fits import quiet
from _linear_softmax import HIGHEST, LOWEST, Data, Rows, Tuned, fit, matrix, optimum
from _measuring import Spread, load, parser, print_table, report, start
from hypernetwork_curves import adam
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lightning_nested.figures.style import COLOURS, open_axes, styled_figure
from lightning_nested.files import replace_figure
from lightning_nested.hypernetworks import DenseResponse, GlobalUniform
from lightning_nested.modules import Global

MIDDLE, HALF = (LOWEST + HIGHEST) / 2, (HIGHEST - LOWEST) / 2
Found = dict[str, dict[str, list[float]]]  # errors, excess and sizes of each setting, by the response's name
KEYS = ("errors", "excess", "sizes")
TITLES = {"ridge": "Ridge: best responses in closed form", "softmax": "Softmax: global hypernetworks"}
DRAWN = ("constant", "linear", "linear, by distance", "quadratic", "any, 1000 steps", "any, 10000 steps")


@dataclass(frozen=True)
class Ridge:
    """Ridge regression of ten classes in the eigenvectors of the inputs' second moments, float64.

    Attributes:
        curvature: Eigenvalues of XᵀX/n, (p,).
        slope: XᵀY/n in their basis, (p, 10).
        inputs: Validation inputs in that basis, (n, p).
        labels: Validation labels as vectors, (n, 10).
        logs: Log decays: the midpoints of equal parts of the range, (m,).
    """

    curvature: Tensor
    slope: Tensor
    inputs: Tensor
    labels: Tensor
    logs: Tensor

    @classmethod
    def of(cls, data: Data, points: int) -> Ridge:
        """Return the regression on both splits."""
        (x, y), (inputs, labels) = (
            (torch.cat([x.double(), torch.ones(len(x), 1).double()], 1), one_hot(y, 10).double())
            for x, y in (data.train, data.val)
        )
        curvature, basis = torch.linalg.eigh(x.T @ x / len(x))
        logs = LOWEST + (HIGHEST - LOWEST) * (torch.arange(points).double() + 0.5) / points
        return cls(curvature.clamp_min(0.0), basis.T @ (x.T @ y) / len(x), inputs @ basis, labels, logs)

    @property
    def bent(self) -> Tensor:
        """Curvature of the training loss with its decay, (m, p)."""
        return self.curvature + self.logs.exp().unsqueeze(1)

    def optimum(self) -> Tensor:
        """Weights at each decay, (m, p, 10)."""
        return self.slope / self.bent.unsqueeze(2)

    def polynomial(self, degree: int, *, by_distance: bool = False) -> Tensor:
        """Return the best polynomial response: by the training loss, or by its distance to the optimal weights."""
        basis = ((self.logs - MIDDLE) / HALF).unsqueeze(1) ** torch.arange(degree + 1)
        if by_distance:
            best = self.optimum().flatten(1)
            return (basis @ torch.linalg.lstsq(basis, best).solution).unflatten(1, self.slope.shape)
        # Normal equations for each eigenvector: E[(s + e^h) φφᵀ] a = E[φ] q.
        weighted = torch.einsum("mp,md,me->pde", self.bent, basis, basis) / len(basis)
        unit = torch.linalg.solve(weighted, basis.mean(0).expand(len(weighted), -1))
        return torch.einsum("md,pd,pk->mpk", basis, unit, self.slope)

    def after(self, steps: int) -> Tensor:
        """Return weights after gradient descent from zero at each decay, of one rate that no decay makes diverge."""
        left = (1.0 - self.bent / self.bent.max()) ** steps
        return self.optimum() * (1.0 - left).unsqueeze(2)

    def compare(self, weights: Tensor) -> dict[str, list[float]]:
        """Return errors, excess and sizes at each log decay, the same for all classes."""
        best = self.optimum()

        def loss(w: Tensor) -> Tensor:
            return 0.5 * (torch.matmul(self.inputs, w) - self.labels).square().sum(2).mean(1)

        excess = 0.5 * (self.bent.unsqueeze(2) * (weights - best).square()).sum((1, 2))
        sizes = weights.flatten(1).norm(dim=1) / best.flatten(1).norm(dim=1)
        found = (loss(weights) - loss(best), excess, sizes)
        return {key: numbers.tolist() for key, numbers in zip(KEYS, found, strict=True)}


def ridge(data: Data, points: int) -> tuple[list[float], Found]:
    """Return mean log decays, and how each kind of response compares there."""
    problem, found = Ridge.of(data, points), {}
    for degree, name in enumerate(("constant", "linear", "quadratic", "cubic", "quartic")):
        found[name] = problem.compare(problem.polynomial(degree))
        if degree < 3:
            found[f"{name}, by distance"] = problem.compare(problem.polynomial(degree, by_distance=True))
    for steps in (100, 1_000, 10_000, 100_000):
        found[f"any, {steps} steps"] = problem.compare(problem.after(steps))
    return problem.logs.tolist(), found


class Centred(DenseResponse):
    """DenseResponse of h minus the middle of its range."""

    def changes(self, delta: Tensor) -> dict[str, Tensor]:
        """Δ of each parameter, zero in the middle."""
        return super().changes(delta - MIDDLE)


KINDS = {"uncentred": DenseResponse, "centred": Centred}


def objective(data: Data, weights: Tensor, decays: Tensor) -> float:
    """Return the training loss with decays (10, 1) of weights (10, 785)."""
    x, y = data.train
    penalty = 0.5 * (decays * weights.square()).sum()
    return float(cross_entropy(x @ weights[:, :-1].T + weights[:, -1], y) + penalty)


def learned(data: Data, response: DenseResponse, steps: int) -> Tuned:
    """Train a global hypernetwork; its rates end at zero."""
    loop = Global(response_steps=steps, perturbation=GlobalUniform(low=LOWEST, high=HIGHEST))
    return fit(
        data, response, loop, steps, per="tensor", start=-2.0, weights=adam(3e-3), phi=adam(3e-3),
        outer=adam(0.0), cosine=True,
    )  # fmt: skip


def softmax(data: Data, seed: int, points: int, settings: Sequence[str]) -> tuple[list[float], Found]:
    """Return mean log decays of random settings, and how each hypernetwork compares there."""
    generator = torch.Generator().manual_seed(seed)
    logs = LOWEST + (HIGHEST - LOWEST) * torch.rand(points, 10, generator=generator)
    best, found = [optimum(data, point.exp().unsqueeze(1)) for point in logs], {}
    for setting in settings:
        kind, width, steps = setting.split(",")
        torch.manual_seed(seed)
        module = learned(data, KINDS[kind](Rows(), 10, hidden=(int(width),)), int(steps))
        numbers: dict[str, list[float]] = {key: [] for key in KEYS}
        for point, optimal in zip(logs, best, strict=True):
            decays, weights = point.exp().unsqueeze(1), matrix(module.network.weights(point))
            numbers["errors"].append(data.losses(weights)[0] - data.losses(optimal)[0])
            numbers["excess"].append(objective(data, weights, decays) - objective(data, optimal, decays))
            numbers["sizes"].append(float(weights.norm() / optimal.norm()))
        found[f"{kind}, {width} units, {steps} steps"] = numbers
    return logs.mean(1).tolist(), found


def thirds(logs: Sequence[float], errors: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean error of all settings, and of the thirds with the smallest and the largest mean log decay."""
    ordered = torch.tensor(errors)[torch.tensor(logs).argsort()]
    count = max(1, len(errors) // 3)
    return float(ordered.mean()), float(ordered[:count].mean()), float(ordered[-count:].mean())


def show(seeds: Sequence[tuple[list[float], Found]], title: str) -> None:
    """Print the table of one part: medians and ranges over seeds."""
    rows = []
    for name in seeds[0][1]:
        means = [
            (*thirds(logs, found[name]["errors"]), mean(found[name]["excess"]), mean(found[name]["sizes"]))
            for logs, found in seeds
        ]
        cells = [Spread.of(column) for column in zip(*means, strict=True)]
        rows.append([name, *(cell.text(digits) for cell, digits in zip(cells, (4, 4, 4, 4, 3), strict=True))])
    print_table(
        [
            title, "mean error", "weakest third of decays", "strongest third",
            "training loss above its optimum", "size of the weights / optimum's",
        ],
        rows,
    )  # fmt: skip


def draw(path: Path, parts: Mapping[str, Sequence[tuple[list[float], Found]]]) -> None:
    """Draw errors over the (mean) log decay: curves of ridge on the first seed, settings of softmax on all seeds."""
    with styled_figure(5.6 * len(parts), 4.2, dpi=110, layout="constrained") as figure:
        panels = figure.subplots(1, len(parts), squeeze=False)[0]
        for axes, (part, seeds) in zip(panels, parts.items(), strict=True):
            names = [name for name in seeds[0][1] if part != "ridge" or name in DRAWN]
            for colour, name in zip(COLOURS, names, strict=False):
                if part == "ridge":
                    logs, found = seeds[0]
                    style = "--" if name.startswith("any") else "-"
                    axes.plot(logs, found[name]["errors"], style, color=colour, label=name)
                    continue
                x = [value for logs, _ in seeds for value in logs]
                y = [value for _, found in seeds for value in found[name]["errors"]]
                axes.scatter(x, y, s=11, color=colour, alpha=0.7, lw=0, label=name)
            axes.axhline(0.0, color="black", lw=0.8)
            axes.legend(fontsize=8)
            label = "log decay" if part == "ridge" else "mean log decay of a setting"
            open_axes(axes, TITLES[part], label, "predicted − true validation loss")
        replace_figure(path, figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, draw the figure."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--size", type=int, default=500, help="images to train, and to tune on")
    options.add_argument("--parts", nargs="+", choices=tuple(TITLES), default=list(TITLES))
    options.add_argument(
        "--settings", nargs="+", default=["uncentred,50,6000", "centred,50,6000"],
        help="hypernetworks of the part softmax: uncentred or centred,units,steps",
    )  # fmt: skip
    options.add_argument(
        "--points", type=int, default=30, help="log decays, or settings of ten, to compare at"
    )
    options.add_argument("--figure", type=Path, default=None)
    arguments = options.parse_args(argv)
    start(arguments)
    quiet()
    before = load()
    parts: dict[str, list[tuple[list[float], Found]]] = {part: [] for part in arguments.parts}
    for seed in range(arguments.rounds):
        data = Data(seed, arguments.size)
        for part, seeds in parts.items():
            if part == "ridge":
                seeds.append(ridge(data, arguments.points))
            else:
                seeds.append(softmax(data, seed, arguments.points, arguments.settings))
            for name, entry in seeds[-1][1].items():
                print(f"seed {seed}, {part}, {name}: mean error {mean(entry['errors']):.4f}", flush=True)
    for part, seeds in parts.items():
        show(seeds, part)
    print(f"load {before} to {load()}")
    if arguments.figure is not None:
        draw(arguments.figure, parts)
    report(arguments, parts, load_before=before)
    return parts


if __name__ == "__main__":
    main()
