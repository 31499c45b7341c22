"""Tuning weight decays by hypergradients against Optuna's TPE and random search.

The same small MLP (10 tensors, 10 054 weights) on 500 Fashion-MNIST images averaged to 14×14, few enough
that decay matters; 500 validation images tune, 10 000 test images judge. A search trains from scratch in
every trial; the callback tunes within one training. Cost counts gradient evaluations: a step is one, a
hypergradient is what it takes in units of one, measured here. At every cost the model of the lowest
validation loss so far is reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _fits import quiet
from _measuring import Spread, load, parser, print_table, report, start
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.datamodules import DigitsDataModule, FashionMNISTDataModule
from lightning_nested.files import replace_figure
from lightning_nested.hypergradient import ConjugateGradient, Current, GaussNewton
from lightning_nested.hypergradient.implicit import implicit_result
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.hyperparameters.transforms import Exp

LOWEST, HIGHEST, START = 1e-6, 1.0, 1e-3  # the range that is searched; where ours begins is its middle
Point = tuple[float, float, float]  # cost, validation loss, test loss
SOLVER = ConjugateGradient(max_iterations=10, tolerance=0.03)


class Data:
    """Three splits as whole batches."""

    def __init__(self, name: str, seed: int, size: int) -> None:
        if name == "digits":
            source: Any = DigitsDataModule(train_size=size // 2, val_size=size // 2, seed=seed)
        else:
            source = FashionMNISTDataModule(train_size=size, val_size=size, seed=seed)
            source.prepare_data()
        source.setup("fit")

        def images(x: Tensor) -> Tensor:
            return (nn.functional.avg_pool2d(x, 2) if name == "fashion" else x).flatten(1)

        self.train = images(source.train_images), source.train_labels
        self.val = images(source.val_images), source.val_labels
        self.test = images(source.test_images), source.test_labels
        mean, scale = self.train[0].mean(), self.train[0].std()
        self.train, self.val, self.test = (
            ((x - mean) / scale, y) for x, y in (self.train, self.val, self.test)
        )
        first = [40, 32, 16, 12] if name == "fashion" else [80, 40, 24, 16]
        self.widths = [self.train[0].shape[1], *first, 10]


class Model(LightningModule):
    """Five linear layers with tanh, whole-batch SGD with momentum."""

    def __init__(self, widths: Sequence[int], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i in range(len(widths) - 1):
            layers += [nn.Linear(widths[i], widths[i + 1]), nn.Tanh()]
        self.network = nn.Sequential(*layers[:-1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def outer_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The same on validation images."""
        return self.training_step(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The searchers' trials use the same."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    @torch.no_grad()
    def losses(self, data: Data) -> tuple[float, float]:
        """Validation and test loss."""
        return float(self.training_step(data.val)), float(self.training_step(data.test))


def train(data: Data, decays: Sequence[Tensor | float], seed: int, steps: int) -> tuple[float, float]:
    """One training from scratch: losses where validation is lowest of ten looks, as in the callback's run."""
    model = Model(data.widths, seed)
    params = list(model.parameters())
    optimizer = model.configure_optimizers()
    best = (float("inf"), float("inf"))
    for step in range(1, steps + 1):
        grads = torch.autograd.grad(model.training_step(data.train), params)
        for p, g, d in zip(params, grads, decays, strict=True):
            p.grad = g + d * p.detach()
        optimizer.step()
        if step % max(1, steps // 10) == 0:
            best = min(best, model.losses(data))
    return best


def best_so_far(points: Sequence[Point]) -> list[Point]:
    """At each cost the test loss of the model with the lowest validation loss until then."""
    best: list[Point] = []
    for cost, val, test in points:
        if best and best[-1][1] <= val:
            val, test = best[-1][1:]
        best.append((cost, val, test))
    return best


def search(data: Data, sampler: str, count: int, seed: int, steps: int, budget: float) -> list[Point]:
    """Trials of a full training each, until the budget is spent."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kinds = {"TPE": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    study = optuna.create_study(sampler=kinds[sampler](seed=seed))
    tensors = 2 * (len(data.widths) - 1)
    points: list[Point] = []
    for trial in range(int(budget / steps)):
        asked = study.ask()
        values = [asked.suggest_float(f"decay{i}", LOWEST, HIGHEST, log=True) for i in range(count)]
        val, test = train(data, values * tensors if count == 1 else values, seed, steps)
        study.tell(asked, val)
        points.append((float((trial + 1) * steps), val, test))
    return best_so_far(points)


class Record(Callback):
    """Validation and test loss along the run, and the end of the budget."""

    def __init__(
        self, data: Data, tuner: HypergradientCallback, price: float, budget: float, every: int
    ) -> None:
        self.data, self.tuner, self.price, self.budget, self.every = data, tuner, price, budget, every
        self.points: list[Point] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """One point every few steps."""
        steps = trainer.global_step
        cost = steps + (self.tuner.outer_steps + self.tuner.skipped_steps) * self.price
        trainer.should_stop = cost >= self.budget
        if steps % self.every == 0 or trainer.should_stop:
            self.points.append((cost, *pl_module.losses(self.data)))


def tune(
    data: Data,
    per: str,
    seed: int,
    *,
    steps: int,
    budget: float,
    every: int,
    warmup: int,
    rate: float,
    price: float,
) -> tuple[list[Point], tuple[float, float], float]:
    """One run of the callback: its curve, a fresh training with its last decays, and skipped steps."""
    # The same range: beyond it SGD with this rate diverges, whoever chose the decay.
    within = Exp(lower=LOWEST, upper=HIGHEST)
    decay = WeightDecay(per=per, init=START, include=["*"], transform=within)  # type: ignore[arg-type]
    tuner = HypergradientCallback(
        decay,
        optimizer=lambda tensors: torch.optim.Adam(tensors, lr=rate),
        solver=SOLVER,
        curvature=GaussNewton(outputs="network"),
        at=Current(),
        every_n_steps=every,
        warmup_steps=warmup,
        outer_dataloader=DataLoader([data.val], batch_size=None),  # type: ignore[arg-type]
        log_every_n_outer_steps=0,
    )
    record = Record(data, tuner, price, budget - steps, every=max(1, steps // 10))
    trainer = Trainer(
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[tuner, record],
    )
    model = Model(data.widths, seed)
    trainer.fit(model, DataLoader([data.train] * 100, batch_size=None))  # type: ignore[arg-type]
    values = [d.detach() for d in decay.decays().values()]
    again = train(data, values, seed, steps)
    cost = record.points[-1][0] + steps
    return best_so_far([*record.points, (cost, *again)]), again, float(tuner.skipped_steps)


def price_of_hypergradient(data: Data) -> float:
    """Time of one hypergradient of a decay per weight in units of a gradient, median of 15."""
    model = Model(data.widths, 0)
    named = dict(model.named_parameters())
    params = tuple(named.values())
    decay = WeightDecay(per="parameter", init=START, include=["*"])
    decay.build(named)

    def gradient() -> None:
        torch.autograd.grad(model.training_step(data.train), params)

    def hypergradient() -> None:
        # The training gradient itself is paid for as the step.
        logits = model.network(data.train[0])
        inner = nn.functional.cross_entropy(logits, data.train[1])
        implicit_result(
            inner,
            model.outer_loss(data.val),
            params,
            (),
            solver=ConjugateGradient(max_iterations=SOLVER.max_iterations, tolerance=0.0),
            curvature=GaussNewton(outputs=logits),
            penalties=[decay.linearize(named)],
        )

    def elapsed(call: Callable[[], None]) -> float:
        begin = time.process_time()
        call()
        return time.process_time() - begin

    for call in (gradient, hypergradient):
        call()
    ratios = []
    for _ in range(15):
        unit = statistics.median(elapsed(gradient) for _ in range(3))
        ratios.append(elapsed(hypergradient) / unit)
    return statistics.median(ratios)


def at(points: Sequence[Point], cost: float) -> float | None:
    """Test loss that ``cost`` buys."""
    affordable = [p for p in points if p[0] <= cost * (1 + 1e-9)]
    return affordable[-1][2] if affordable else None


def figure(path: Path, curves: dict[str, list[list[Point]]], steps: int) -> None:
    """Test loss against cost: median and range over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(8, 4.6))
    palette = ["#9ecae1", "#3182bd", "#bdbdbd", "#636363", "#fdae6b", "#e6550d", "#a63603"]
    for (name, runs), color in zip(curves.items(), palette, strict=False):
        costs = sorted({p[0] for run in runs for p in run if all(at(r, p[0]) is not None for r in runs)})
        values = [[at(run, c) for run in runs] for c in costs]
        ours = name.startswith("ours")
        x = [c / steps for c in costs]
        axis.plot(
            x,
            [statistics.median(v) for v in values],  # type: ignore[type-var]
            color=color,
            label=f"{name} decays" if not name.endswith(", 1") else f"{name} decay",
            linewidth=2 if ours else 1.5,
            linestyle="-" if ours else "--",
        )
        axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.1)  # type: ignore[type-var]
    # A search's first trial may be anything: the medians decide what is shown.
    medians = [float(y) for line in axis.lines for y in line.get_ydata()]
    lowest = min(p[2] for runs in curves.values() for run in runs for p in run)
    axis.set_ylim(0.97 * lowest, 1.05 * max(medians))
    axis.set(
        xscale="log",
        xlabel=f"cost in trainings of {steps} gradients",
        ylabel="test loss of the best model by validation",
    )
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.tight_layout()
    replace_figure(path, fig, dpi=130)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, rounds=5)
    options.add_argument("--data", choices=("fashion", "digits"), default="fashion")
    options.add_argument("--size", type=int, default=500, help="training and validation images each")
    options.add_argument("--steps", type=int, default=600, help="gradients of one training")
    options.add_argument("--trainings", type=int, default=24, help="budget in trainings")
    options.add_argument("--every", type=int, default=10, help="inner steps per outer step")
    options.add_argument("--rate", type=float, default=0.1, help="outer rate of Adam on log decays")
    options.add_argument("--figure", type=Path, default=None)
    arguments: argparse.Namespace = options.parse_args(argv)
    start(arguments)
    before = load()
    quiet()
    budget = float(arguments.steps * arguments.trainings)
    curves: dict[str, list[list[Point]]] = {}
    fresh: dict[str, list[tuple[float, float]]] = {}
    untuned, skipped, price = [], 0.0, 0.0
    for seed in range(arguments.rounds):  # a round is a seed: split, initial weights and sampler
        data = Data(arguments.data, seed, arguments.size)
        tensors = 2 * (len(data.widths) - 1)
        price = price or price_of_hypergradient(data)
        untuned.append(train(data, [START] * tensors, seed, arguments.steps)[1])
        if find_spec("optuna") is None:
            print("optuna is not installed: left out. See benchmarks/requirements.txt.")
        else:
            for sampler in ("TPE", "random"):
                for count in (1, tensors):
                    curve = search(data, sampler, count, seed, arguments.steps, budget)
                    curves.setdefault(f"Optuna {sampler}, {count}", []).append(curve)
        weights = sum(p.numel() for p in Model(data.widths, 0).parameters())
        for per, count in (("model", 1), ("tensor", tensors), ("parameter", weights)):
            curve, again, failed = tune(
                data,
                per,
                seed,
                steps=arguments.steps,
                budget=budget,
                every=arguments.every,
                warmup=arguments.steps // 6,
                rate=arguments.rate,
                price=price,
            )
            curves.setdefault(f"ours, {count}", []).append(curve)
            fresh.setdefault(f"ours, {count}", []).append(again)
            skipped += failed
    print(f"\nA hypergradient costs {price:.1f} gradients here; {skipped:.0f} outer steps were skipped.")
    print(f"Untuned decay {START:g}: test loss {Spread.of(untuned).text(3)}.")
    marks = sorted({m for m in (1, 2, 4, 8, 16, arguments.trainings) if m <= arguments.trainings})
    rows, results = [], {}
    for name, runs in curves.items():
        cells: list[Spread | None] = []
        for mark in marks:
            values = [at(run, mark * arguments.steps) for run in runs]
            cells.append(None if None in values else Spread.of([v for v in values if v is not None]))
        end = Spread.of([t for _, t in fresh[name]]) if name in fresh else None
        rows.append(
            [name, *("-" if c is None else c.text(3) for c in cells), "-" if end is None else end.text(3)]
        )
        results[name] = {
            "test_loss": dict(zip(map(str, marks), cells, strict=True)),
            "retrained_from_scratch": end,
            "curves": runs,
        }
    header = ["tuner, decays", *(f"cost {m}" for m in marks), "trained afresh with its decays"]
    print(f"Test loss after so many trainings ({arguments.steps} gradients), median [quartiles] of seeds:")
    print_table(header, rows)
    if arguments.figure is not None:
        figure(arguments.figure, curves, arguments.steps)
    whole = {"hypergradient_in_gradients": price, "untuned": Spread.of(untuned), "tuners": results}
    report(arguments, whole, packages=("optuna",), load_before=before)
    return whole


if __name__ == "__main__":
    main()
