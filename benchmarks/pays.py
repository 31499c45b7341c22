"""What the one line gains and costs: ``HypergradientCallback(WeightDecay())`` beside plain training and searches.

Eight tasks, five seeds, each method by real fits of the Trainer; the test data are read once, for the model that a
method hands over. The grid of eleven fixed decays and Optuna's TPE with sixteen trials train from scratch in every
trial and keep the model of the lowest validation loss. Cost is the CPU time of the whole fit, beside that of a plain
one right before it. ``--laplace`` adds laplace-torch's ``marglik_training``, which tunes a decay per tensor by the
marginal likelihood and needs no validation data, on the classifiers without batch norm.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _fits import plain_trainer, quiet
from _measuring import load, parser, print_table, report, start
from _pays_tasks import FEW, SHORT, TASKS, Pair, Task
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested import HypergradientCallback, WeightDecay
from lightning_nested.figures.style import open_axes, styled_figure
from lightning_nested.files import replace_figure

# Designs were chosen on seeds 100 to 102 and other tasks; seeds 0 to 2 were reported before, and have been looked at.
SEEDS = (10, 11, 12, 13, 14)
_OPTIONS = ("lr", "momentum", "betas", "weight_decay")


class Fit(LightningModule):
    """A network and its loss."""

    def __init__(self, task: Task, decay: float | None) -> None:
        super().__init__()
        self.task, self.decay, self.network = task, decay, task.network()

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """Return the mean loss."""
        return self.task.loss(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """Return the mean loss."""
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        optimizer = self.task.make_optimizer(self.parameters(), self.decay)
        if self.task.schedule == "constant":
            return optimizer
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.task.steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def score(self, data: Pair) -> tuple[float, float]:
        """Return loss and accuracy."""
        self.eval()
        with torch.no_grad():
            outputs = [self.network(x) for x in data[0].split(500)]
        output = torch.cat(outputs)
        hits = float((output.argmax(1) == data[1]).double().mean()) if self.task.counts else math.nan
        return float(self.task.loss(output, data[1])), hits


def fit(
    task: Task,
    data: tuple[Pair, Pair, Pair],
    seed: int,
    decay: float | None,
    callbacks: Sequence[Callback] = (),
) -> tuple[Fit, float]:
    """Return a trained module and the CPU time of the fit."""
    seed_everything(seed, verbose=False)
    module = Fit(task, decay)
    # The same order of batches for every method.
    generator = torch.Generator().manual_seed(seed)
    train = DataLoader(TensorDataset(*data[0]), task.batch, shuffle=True, drop_last=True, generator=generator)
    val = DataLoader(TensorDataset(*data[1]), task.batch, shuffle=True)
    trainer = plain_trainer(task.steps, callbacks)
    before = time.process_time()
    trainer.fit(module, train, val)
    return module, time.process_time() - before


def searched(task: Task, data: tuple[Pair, Pair, Pair], seed: int, trials: int) -> Fit:
    """Return the model that TPE finds; the first trial is torch's default decay."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    best: list[tuple[float, Fit]] = []

    def objective(trial: Any) -> float:
        decay = trial.suggest_float("decay", task.grid[1], task.grid[-1], log=True)
        module, _ = fit(task, data, seed, decay)
        loss = module.score(data[1])[0]
        if not best or loss < best[0][0]:
            best[:] = [(loss, module)]
        return loss if math.isfinite(loss) else 1e9

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=trials)
    return best[0][1]


def has_laplace(task: Task) -> bool:
    """Return True for what laplace-torch's Kronecker factors are made for: linear layers, and labels of classes."""
    known = (torch.nn.Sequential, torch.nn.Linear, torch.nn.ReLU, torch.nn.Tanh)
    return task.counts and all(isinstance(m, known) for m in task.network().modules())


def marginal(task: Task, seed: int, rounds: int) -> dict[str, Any]:
    """Return the test score of laplace-torch's online marginal likelihood, and its cost beside a plain fit.

    Immer, Bauer, Fortuin, Rätsch & Khan (2021), ICML, PMLR 139:4563-4573. Its own defaults, but for an estimate after
    every fifth epoch; the optimizer, schedule, batches and number of steps are those of the plain fit.
    """
    from laplace import marglik_training

    data, costs, scores = task.data(seed), [], []
    for _ in range(rounds):
        _, plain = fit(task, data, seed, None)
        seed_everything(seed, verbose=False)
        module = Fit(task, 0.0)
        generator = torch.Generator().manual_seed(seed)
        train = DataLoader(
            TensorDataset(*data[0]), task.batch, shuffle=True, drop_last=True, generator=generator
        )
        optimizer = task.make_optimizer(module.parameters(), 0.0)
        cosine = task.schedule == "cosine"
        before = time.process_time()
        _, network, *_ = marglik_training(
            module.network,
            train,
            optimizer_cls=type(optimizer),
            # The decay is the prior's; AdamW would add its own.
            optimizer_kwargs={k: v for k, v in optimizer.defaults.items() if k in _OPTIONS},
            scheduler_cls=torch.optim.lr_scheduler.CosineAnnealingLR if cosine else None,
            scheduler_kwargs={"T_max": task.steps} if cosine else None,
            n_epochs=-(-task.steps // len(train)),
            marglik_frequency=5,
        )
        costs.append((time.process_time() - before) / plain)
        module.network = network
        scores.append(module.score(data[2]))
    return {"laplace": scores[0], "laplace cost": statistics.median(costs)}


def rivals(task: Task, seed: int, trials: int, *, grid: bool = True) -> dict[str, tuple[float, float]]:
    """Return test loss and accuracy of plain training, of the grid and of TPE on one task and seed."""
    data = task.data(seed)
    if not grid:
        return {"plain": fit(task, data, seed, None)[0].score(data[2])}
    fixed = [fit(task, data, seed, decay)[0] for decay in task.grid]
    losses = [m.score(data[1])[0] for m in fixed]
    best = min(range(len(fixed)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    models = {"plain": fit(task, data, seed, None)[0], "grid": fixed[best]}
    if trials:
        models["tpe"] = searched(task, data, seed, trials)
    return {name: module.score(data[2]) for name, module in models.items()}


def tuned(task: Task, seed: int, callbacks: Callable[[], list[Callback]], rounds: int) -> dict[str, Any]:
    """Return the test score with callbacks, and the CPU time of the fit beside a plain one, in the median of rounds."""
    data, costs, scores = task.data(seed), [], []
    for _ in range(rounds):
        _, plain = fit(task, data, seed, None)
        # Under AdamW the callback takes the place of the optimizer's own decay.
        module, time_of_fit = fit(task, data, seed, None, callbacks())
        costs.append(time_of_fit / plain)
        scores.append(module.score(data[2]))
    return {"tuned": scores[0], "cost": statistics.median(costs)}


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def summarise(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Print the table; return the figures that the marks ask for."""
    rows, medians, hurts, costs, ahead, accuracies = [], [], [], [], [], []
    for name, runs in results.items():
        over_plain = [r["tuned"][0] / r["plain"][0] for r in runs]
        hurts += over_plain
        cost = [r["cost"] for r in runs]
        costs.append(statistics.median(cost))
        gain = [100 * (r["tuned"][1] - r["plain"][1]) for r in runs]
        accuracies.append(statistics.median(gain))
        over_grid = [r["tuned"][0] / r["grid"][0] for r in runs if "grid" in r]
        medians += [statistics.median(over_grid)] if over_grid else []
        row = [name, _spread(over_plain), _spread(over_grid) if over_grid else "not run"]
        over_tpe = [r["tuned"][0] / r["tpe"][0] for r in runs if "tpe" in r]
        if over_tpe:
            ahead.append(statistics.median(over_tpe) < 1)
        row.append(_spread(over_tpe) if over_tpe else "not run")
        rows.append([*row, f"{statistics.median(gain):+.1f}", _spread(cost)])
    header = ["task", "test loss / plain", "/ grid", "/ TPE", "accuracy, points", "CPU time / plain"]
    print_table(header, rows)
    figures = {
        "share of fits at most 1.02 of plain": sum(h <= 1.02 for h in hurts) / len(hurts),
        "worst over plain": max(hurts),
        "median cost": statistics.median(costs),
        "largest median cost": max(costs),
        "median over the grid": statistics.median(medians) if medians else None,
        "tasks ahead of TPE": sum(ahead),
        "tasks beside TPE": len(ahead),
        "lowest median gain of accuracy": min(a for a in accuracies if not math.isnan(a)),
    }
    for key, value in figures.items():
        print(f"{key}: {value if value is None else round(value, 3)}")
    return figures


# Of the methods in the figure: key of their results, label, colour and trainings; None: measured.
_METHODS = (
    ("plain", "plain training", "#8a8f98", 1.0),
    ("tuned", "HypergradientCallback(WeightDecay())", "#e1691e", None),
    ("laplace", "marginal likelihood (laplace-torch)", "#1b9e77", None),
    ("grid", "grid of 11 fixed decays", "#2f6db3", 11.0),
    ("tpe", "Optuna TPE, 16 trials", "#6a3d9a", 16.0),
)


def figure(path: Path, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw test loss over cost, a panel for each task: medians of the seeds, with their ranges."""
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    with styled_figure(3.1 * columns + 0.6, 2.7 * rows + 0.9, layout="constrained") as page:
        panels = page.subplots(rows, columns, squeeze=False, sharex=True)
        drawn: dict[str, Any] = {}
        for i, (panel, (task, runs)) in enumerate(zip(panels.flat, results.items(), strict=False)):
            _draw(panel, runs, drawn)
            first, last = i % columns == 0, i + columns >= len(results)
            open_axes(
                panel,
                _broken(task),
                "cost, in plain trainings" if last else "",
                "test loss / plain training's" if first else "",
            )
            panel.tick_params(labelbottom=last)
        for panel in list(panels.flat)[len(results) :]:
            panel.set_visible(False)
        costs = [
            r[key] for runs in results.values() for r in runs for key in ("cost", "laplace cost") if key in r
        ]
        panels[0, 0].set_xlim(0.8, max([22.0, *(1.2 * cost for cost in costs)]))
        seeds = max(len(runs) for runs in results.values())
        said = f"Median and range of {seeds} seeds; " if seeds > 1 else ""
        page.suptitle(f"{said}lower and further left is better", fontsize=10.5)
        labels = [label for _, label, *_ in _METHODS if label in drawn]
        page.legend(
            [drawn[label] for label in labels], labels, loc="outside lower center", ncols=min(3, columns)
        )
        replace_figure(path, page, dpi=200)


def _draw(panel: Any, runs: Sequence[Mapping[str, Any]], drawn: dict[str, Any]) -> None:
    """Draw one task, and keep a handle of each label."""
    panel.axhline(1.0, color="#8a8f98", linewidth=0.8, linestyle="--")
    for key, label, colour, trainings in _METHODS:
        found = [r for r in runs if key in r]
        if not found:
            continue
        losses = [r[key][0] / r["plain"][0] for r in found]
        cost_key = "cost" if key == "tuned" else f"{key} cost"
        costs = [trainings if trainings is not None else r[cost_key] for r in found]
        x, y = statistics.median(costs), statistics.median(losses)
        drawn[label] = panel.errorbar(
            x,
            y,
            xerr=[[x - min(costs)], [max(costs) - x]],
            yerr=[[y - min(losses)], [max(losses) - y]],
            fmt="D" if key == "tuned" else "o",
            color=colour,
            markersize=7 if key == "tuned" else 5.5,
            capsize=2.5,
            elinewidth=1.2,
        )
    panel.set_xscale("log")
    panel.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    panel.minorticks_off()
    panel.locator_params(axis="y", nbins=6)
    panel.yaxis.set_major_formatter("{x:.2f}")


def _broken(task: str) -> str:
    """Return a task's name on two lines, if it is long."""
    head, _, tail = task.partition(", ")
    return f"{head},\n{tail}" if len(task) > 26 else task


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, rounds=1)
    options.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    options.add_argument(
        "--tasks",
        type=int,
        nargs="*",
        default=list(range(len(TASKS))),
        help="8 and 9: short trainings; 10 to 12: few epochs",
    )
    options.add_argument(
        "--init", type=float, default=None, help="start of the decays; default: the library's"
    )
    options.add_argument(
        "--per", choices=("tensor", "parameter"), default="tensor", help="what has a decay of its own"
    )
    options.add_argument("--trials", type=int, default=16, help="trials of TPE; 0: the grid alone")
    options.add_argument(
        "--rivals",
        type=Path,
        default=None,
        help="JSON file to keep the rivals' results in, and to read them from",
    )
    options.add_argument("--no-grid", action="store_true", help="of the rivals plain training alone")
    options.add_argument(
        "--only-rivals", action="store_true", help="fill that file, and measure nothing else"
    )
    options.add_argument("--laplace", action="store_true", help="laplace-torch's marginal likelihood too")
    options.add_argument("--figure", type=Path, default=None, help="file for test loss over cost")
    arguments = options.parse_args()
    start(arguments)
    before = load()
    laplace = arguments.laplace and find_spec("laplace") is not None
    if arguments.laplace and not laplace:
        print("laplace-torch is not installed: left out. See benchmarks/requirements.txt.")
    quiet()
    path = arguments.rivals
    kept: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    results: dict[str, list[dict[str, Any]]] = {}
    for index in arguments.tasks:
        task = (*TASKS, *SHORT, *FEW)[index]
        for seed in arguments.seeds:
            key = f"{task.name}/{seed}/{arguments.trials}"
            if key not in kept:
                kept[key] = rivals(task, seed, arguments.trials, grid=not arguments.no_grid)
                if path is not None:
                    path.write_text(json.dumps(kept))
            found: dict[str, Any] = {"seed": seed, **kept[key]}
            if not arguments.only_rivals:
                found |= tuned(
                    task,
                    seed,
                    lambda: [HypergradientCallback(WeightDecay(per=arguments.per, init=arguments.init))],
                    arguments.rounds,
                )
                if laplace and has_laplace(task):
                    found |= marginal(task, seed, arguments.rounds)
            results.setdefault(task.name, []).append(found)
            print(task.name, found, flush=True)
    if arguments.only_rivals:
        return
    if arguments.figure is not None:
        figure(arguments.figure, results)
    report(
        arguments,
        {"tasks": results, "figures": summarise(results)},
        packages=("optuna", "laplace-torch"),
        load_before=before,
    )


if __name__ == "__main__":
    main()
