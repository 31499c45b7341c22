"""Why a global hypernetwork predicts too low a validation loss: ten decays of a linear softmax.

The setting is that of ``hypernetwork_curves.py``. The response is compared with trainings to convergence (L-BFGS) at
random decays: predicted minus true validation loss, over all settings and over the thirds with the weakest and the
strongest decays; how far its weights are from the optimum of the training loss (excess), and how large they are beside
those of the optimum. Longer trainings and a wider hypernetwork say whether time or capacity is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _fits import quiet
from _linear_softmax import HIGHEST, LOWEST, Data, Rows, fit, matrix, optimum
from _measuring import Spread, load, parser, print_table, report, start
from hypernetwork_curves import adam
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_nested.figures.style import COLOURS, open_axes, styled_figure
from lightning_nested.files import replace_figure
from lightning_nested.hypernetworks import DenseResponse, GlobalUniform
from lightning_nested.modules import Global


def objective(data: Data, weights: Tensor, decays: Tensor) -> float:
    """Return the training loss with decays (10, 1) of weights (10, 785)."""
    x, y = data.train
    penalty = 0.5 * (decays * weights.square()).sum()
    return float(cross_entropy(x @ weights[:, :-1].T + weights[:, -1], y) + penalty)


def compared(data: Data, points: Tensor, best: Sequence[Tensor], hidden: int, steps: int) -> dict[str, Any]:
    """Return errors of a hypernetwork at points whose optimal weights are known."""
    loop = Global(response_steps=steps, perturbation=GlobalUniform(low=LOWEST, high=HIGHEST))
    module = fit(
        data, DenseResponse(Rows(), 10, hidden=(hidden,)), loop, steps, per="tensor", start=-2.0,
        weights=adam(3e-3), phi=adam(3e-3), outer=adam(0.0), cosine=True,
    )  # fmt: skip
    errors, excess, sizes = [], [], []
    for point, optimal in zip(points, best, strict=True):
        decays, learned = point.exp().unsqueeze(1), matrix(module.network.weights(point))
        errors.append(data.losses(learned)[0] - data.losses(optimal)[0])
        excess.append(objective(data, learned, decays) - objective(data, optimal, decays))
        sizes.append(float(learned.norm() / optimal.norm()))
    return {"errors": errors, "excess": excess, "sizes": sizes}


def thirds(points: Tensor, errors: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean error of all settings, and of the thirds with the smallest and the largest mean log decay."""
    ordered = torch.tensor(errors)[points.mean(1).argsort()]
    count = max(1, len(errors) // 3)
    return float(ordered.mean()), float(ordered[:count].mean()), float(ordered[-count:].mean())


def draw(path: Path, seeds: Sequence[dict[str, Any]]) -> None:
    """Draw the error of each setting against its mean log decay."""
    with styled_figure(7.0, 4.2, dpi=110, layout="constrained") as figure:
        axes = figure.subplots()
        for colour, name in zip(COLOURS, seeds[0]["found"], strict=False):
            x = [value for seed in seeds for value in torch.tensor(seed["points"]).mean(1).tolist()]
            y = [value for seed in seeds for value in seed["found"][name]["errors"]]
            axes.scatter(x, y, s=9, color=colour, alpha=0.6, lw=0, label=name)
        axes.axhline(0.0, color="black", lw=0.8)
        axes.legend()
        open_axes(
            axes, "Error of the global hypernetwork", "mean log decay of a setting", "predicted − true loss"
        )
        replace_figure(path, figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, draw the figure."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--size", type=int, default=500, help="images to train, and to tune on")
    options.add_argument("--steps", type=int, nargs="+", default=[6_000, 24_000])
    options.add_argument("--hidden", type=int, nargs="+", default=[50, 200])
    options.add_argument("--points", type=int, default=60)
    options.add_argument("--figure", type=Path, default=None)
    arguments = options.parse_args(argv)
    start(arguments)
    quiet()
    before, seeds = load(), []
    for seed in range(arguments.rounds):
        torch.manual_seed(seed)
        data = Data(seed, arguments.size)
        generator = torch.Generator().manual_seed(seed)
        points = LOWEST + (HIGHEST - LOWEST) * torch.rand(arguments.points, 10, generator=generator)
        best = [optimum(data, point.exp().unsqueeze(1)) for point in points]
        # The first width at each length, then the other widths at the first length.
        settings = [(arguments.hidden[0], steps) for steps in arguments.steps]
        settings += [(hidden, arguments.steps[0]) for hidden in arguments.hidden[1:]]
        found = {
            f"{hidden} units, {steps} steps": compared(data, points, best, hidden, steps)
            for hidden, steps in settings
        }
        seeds.append({"points": points.tolist(), "found": found})
        for name, entry in found.items():
            means = [*thirds(points, entry["errors"]), *(mean(entry[key]) for key in ("excess", "sizes"))]
            print(f"seed {seed}, {name}:", [round(value, 4) for value in means], flush=True)
    rows = []
    for name in seeds[0]["found"]:
        means = [thirds(torch.tensor(seed["points"]), seed["found"][name]["errors"]) for seed in seeds]
        cells = [Spread.of(column).text(4) for column in zip(*means, strict=True)]
        for key, digits in (("excess", 4), ("sizes", 3)):
            cells.append(Spread.of([mean(seed["found"][name][key]) for seed in seeds]).text(digits))
        rows.append([name, *cells])
    print_table(
        [
            "hypernetwork", "mean error", "weakest third of decays", "strongest third",
            "training loss above its optimum", "size of the weights / optimum's",
        ],
        rows,
    )  # fmt: skip
    print(f"load {before} to {load()}")
    if arguments.figure is not None:
        draw(arguments.figure, seeds)
    report(arguments, {"seeds": seeds}, load_before=before)
    return {"seeds": seeds}


if __name__ == "__main__":
    main()
