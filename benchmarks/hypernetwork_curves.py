"""Learned against true validation curves: one decay, ten decays, and a Gaussian process on 25 trainings.

Linear softmax, 500 Fashion-MNIST images each to train and tune on. The global hypernetwork is an MLP of 50 hidden
units to all 7 850 weights; "true" is L-BFGS to convergence. The Gaussian process sees 25 pairs of log decays and the
validation loss of a finished training, as the hypernetwork's competitor in Lorraine & Duvenaud (2018).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _fits import quiet
from _linear_softmax import HIGHEST, LOWEST, Data, Rows, fit, matrix, optimum
from _measuring import Spread, load, parser, print_table, report, start
from torch import Tensor

from lightning_nested.files import replace_figure
from lightning_nested.hypernetworks import DenseResponse, FactorisedResponse, FixedScale, GlobalUniform
from lightning_nested.modules import DeltaSTN, Global


def adam(rate: float) -> Any:
    """From parameters to Adam."""
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def sgd(rate: float) -> Any:
    """From parameters to heavy ball."""
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9)


SIGMA = 0.1  # of the local perturbation


def local(n: int) -> FactorisedResponse:
    """w₀ + B h: linear in its parameters. The slope's curvature is σ² times the weights', and so is its rate."""
    response = FactorisedResponse(Rows(), n, rank=n)
    with torch.no_grad():
        response.encoder.copy_(torch.eye(n))
    response.encoder.requires_grad_(False)
    return response


def one_decay(data: Data, steps: int) -> dict[str, Any]:
    """Curves at 30 values, and where each has its minimum."""
    grid = torch.linspace(LOWEST, HIGHEST, 30)
    true = [data.losses(optimum(data, v.exp()))[0] for v in grid]
    fine = torch.linspace(-6.0, -3.5, 51)
    fine_true = torch.tensor([data.losses(optimum(data, v.exp()))[0] for v in fine])
    best = float(fine[fine_true.argmin()])
    begin = time.process_time()
    loop = Global(response_steps=steps, perturbation=GlobalUniform(low=LOWEST, high=HIGHEST))
    everywhere = fit(
        data, DenseResponse(Rows(), 1, hidden=(50,)), loop, steps + steps // 5, per="model", start=-2.0,
        weights=adam(3e-3), phi=adam(3e-3), outer=adam(0.03), cosine=True,
    )  # fmt: skip
    seconds = {"global": time.process_time() - begin}
    begin = time.process_time()
    near = fit(
        data, local(1), DeltaSTN(train_steps=5, perturbation=FixedScale(scale=SIGMA, signs=True)),
        steps // 2, per="model", start=-2.0, weights=sgd(0.05), phi=sgd(0.02 / SIGMA**2), outer=adam(0.03),
    )  # fmt: skip
    seconds["local"] = time.process_time() - begin

    def curve(module: Any, points: Tensor) -> list[float]:
        return [data.losses(matrix(module.network.weights(v.reshape(1))))[0] for v in points]

    learned = torch.tensor(curve(everywhere, fine))
    return {
        "grid": grid.tolist(),
        "true": true,
        "global": curve(everywhere, grid),
        "local": curve(near, grid),
        "minimum": {
            "true": best,
            "global curve": float(fine[learned.argmin()]),
            "global, its outer steps": float(everywhere.vector.flat().detach()),
            "Delta-STN": float(near.vector.flat().detach()),
        },
        "seconds": seconds,
    }


def ten_decays(data: Data, steps: int, count: int, seed: int) -> dict[str, Any]:
    """Predicted minus true validation loss at random decays, and where each method's outer steps end."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    generator = torch.Generator().manual_seed(seed)

    def drawn(number: int) -> Tensor:
        return LOWEST + (HIGHEST - LOWEST) * torch.rand(number, 10, generator=generator)

    def trained(points: Tensor) -> Tensor:
        return torch.tensor([data.losses(optimum(data, p.exp().unsqueeze(1)))[0] for p in points])

    seen, points = drawn(25), drawn(count)
    seen_losses, truth = trained(seen), trained(points)
    kernel = ConstantKernel() * RBF(length_scale=[3.0] * 10, length_scale_bounds=(0.3, 100.0)) + WhiteKernel(
        1e-3
    )
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=3, random_state=seed)
    process.fit(seen.numpy(), seen_losses.numpy())
    by_process = torch.from_numpy(process.predict(points.numpy())).float()
    loop = Global(response_steps=steps, perturbation=GlobalUniform(low=LOWEST, high=HIGHEST))
    module = fit(
        data, DenseResponse(Rows(), 10, hidden=(50,)), loop, steps + steps // 5, per="tensor", start=-2.0,
        weights=adam(3e-3), phi=adam(3e-3), outer=adam(0.03), cosine=True,
    )  # fmt: skip
    by_network = torch.tensor([data.losses(matrix(module.network.weights(p)))[0] for p in points])
    found = {}
    near = fit(
        data, local(10), DeltaSTN(train_steps=5, perturbation=FixedScale(scale=SIGMA, signs=True)),
        steps // 2, per="tensor", start=-2.0, weights=sgd(0.05), phi=sgd(0.004 / SIGMA**2), outer=adam(0.03),
    )  # fmt: skip
    for name, tuned in (("global", module), ("Delta-STN", near)):
        found[name] = data.losses(optimum(data, tuned.vector.flat().detach().exp().unsqueeze(1)))
    found["best of 25 trainings"] = data.losses(optimum(data, seen[seen_losses.argmin()].exp().unsqueeze(1)))
    return {
        "truth": truth.tolist(),
        "hypernetwork": (by_network - truth).tolist(),
        "Gaussian process": (by_process - truth).tolist(),
        "found": found,
    }


def figure(path: Path, ones: Sequence[dict[str, Any]], tens: Sequence[dict[str, Any]]) -> None:
    """The curves of the first seed, and histograms of the errors of all."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(draw, found) for draw, found in ((draw_curves, ones), (draw_errors, tens)) if found]
    fig, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False)
    for axis, (draw, found) in zip(axes[0], panels, strict=True):
        draw(axis, found)
        axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.5)
    fig.tight_layout()
    replace_figure(path, fig, dpi=110)
    plt.close(fig)


def draw_curves(axis: Any, ones: Sequence[dict[str, Any]]) -> None:
    """Learned and true."""
    one = ones[0]
    axis.plot(
        one["grid"], one["true"], "o", color="black", markersize=4, label="true: trained to convergence"
    )
    axis.plot(one["grid"], one["global"], color="#3182bd", linewidth=2, label="global hypernetwork")
    near = one["minimum"]["Delta-STN"]
    window = [(x, y) for x, y in zip(one["grid"], one["local"], strict=True) if abs(x - near) < 1.3]
    axis.plot(*zip(*window, strict=True), color="#e6550d", linewidth=2, label="Delta-STN, around its λ")
    axis.axvline(one["minimum"]["true"], color="black", linewidth=0.8, linestyle=":", label="true minimum")
    axis.axvline(near, color="#e6550d", linewidth=0.8, linestyle="--", label="where Delta-STN ends")
    low, high = min(one["true"]), max(one["true"])
    axis.set_ylim(low - 0.12 * (high - low), high + 0.1 * (high - low))
    axis.set(xlabel="log decay", ylabel="validation loss", title="One decay: learned and true curve")


def draw_errors(axis: Any, tens: Sequence[dict[str, Any]]) -> None:
    """Histograms over all seeds."""
    errors = [[e for ten in tens for e in ten[name]] for name in ("hypernetwork", "Gaussian process")]
    reach = 1.05 * max(abs(e) for group in errors for e in group)
    edges = [reach * (2 * i / 40 - 1) for i in range(41)]
    axis.hist(errors[0], edges, color="#3182bd", alpha=0.7, label="global hypernetwork")
    axis.hist(errors[1], edges, color="#969696", alpha=0.7, label="Gaussian process on 25 trainings")
    axis.axvline(0.0, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="predicted − true validation loss", ylabel="random settings", title="Ten decays: errors")


def show_minima(ones: Sequence[dict[str, Any]]) -> None:
    """Distance of each minimum from the true one, in log decay."""
    rows = []
    for name in [n for n in ones[0]["minimum"] if n != "true"]:
        off = [one["minimum"][name] - one["minimum"]["true"] for one in ones]
        rows.append([name, Spread.of(off).text(3), f"{max(map(abs, off)):.3f}"])
    print_table(["one decay", "minimum minus the true one", "largest distance"], rows)


def show_errors(tens: Sequence[dict[str, Any]]) -> None:
    """Errors of prediction, and the losses of a training with the decays that each method found."""
    rows = []
    for name in ("hypernetwork", "Gaussian process"):
        numbers = []
        for ten in tens:
            error, truth = torch.tensor(ten[name]), torch.tensor(ten["truth"])
            correlation = torch.corrcoef(torch.stack([truth, truth + error]))[0, 1]
            numbers.append((error.mean(), error.abs().mean(), error.square().mean().sqrt(), correlation))
        rows.append(
            [name, *(Spread.of([float(n) for n in column]).text(4) for column in zip(*numbers, strict=True))]
        )
    print_table(["ten decays", "mean error", "mean absolute error", "root mean square", "correlation"], rows)
    rows = [
        [name, *(Spread.of([ten["found"][name][i] for ten in tens]).text(4) for i in (0, 1))]
        for name in tens[0]["found"]
    ]
    print_table(["ten decays, trained with those of", "validation loss", "test loss"], rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, rounds=3)
    options.add_argument("--size", type=int, default=500, help="images to train, and to tune on")
    options.add_argument("--steps", type=int, default=6000, help="steps of the global hypernetwork")
    options.add_argument("--points", type=int, default=100, help="random settings of ten decays")
    options.add_argument("--parts", nargs="+", choices=("one", "ten"), default=["one", "ten"])
    options.add_argument("--figure", type=Path, default=None)
    arguments = options.parse_args(argv)
    start(arguments)
    before = load()
    quiet()
    results = []
    for seed in range(arguments.rounds):
        torch.manual_seed(seed)
        data = Data(seed, arguments.size)
        found: dict[str, Any] = {}
        if "one" in arguments.parts:
            found["one"] = one_decay(data, arguments.steps)
            print(
                f"seed {seed}: minimum at {found['one']['minimum']}, CPU s {found['one']['seconds']}",
                flush=True,
            )
        if "ten" in arguments.parts:
            found["ten"] = ten_decays(data, arguments.steps, arguments.points, seed)
            print(f"seed {seed}: {found['ten']['found']}", flush=True)
        results.append(found)
    if "one" in arguments.parts:
        show_minima([found["one"] for found in results])
    if "ten" in arguments.parts:
        show_errors([found["ten"] for found in results])
    if arguments.figure is not None:
        figure(arguments.figure, *([found[p] for found in results if p in found] for p in ("one", "ten")))
    report(arguments, {"seeds": results}, packages=("scikit-learn",), load_before=before)
    return {"seeds": results}


if __name__ == "__main__":
    main()
