"""What one line does against wrong training labels: ``HypergradientCallback(ExampleWeights(n))`` with its defaults.

Beside plain training, training on the right labels of the same images, and small-loss ranking: a fit of a tenth of
the length ranks the images by their loss, and as many as are wrong (their number is given to it) are left out of a
second fit. Two more use the validation data, whose labels are right, without any weights: training on them alone, and
on them together with the others. Each is a real fit of the Trainer; the test data are read once, at the end. Cost is
the CPU time of the whole fit, beside that of a plain one right before it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from _arms import auroc
from _fits import plain_trainer, quiet
from _measuring import load, parser, print_table, report, start
from _pays_tasks import Pair, cnn, digits, fashion, mlp
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested import ExampleWeights, HypergradientCallback

# Designs were chosen on seeds 100 to 102.
SEEDS = (10, 11, 12, 13, 14)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Images with a share of wrong training labels, and a way to train on them."""

    name: str
    data: Callable[[float], Callable[[int], tuple[Pair, Pair, Pair]]]
    network: Callable[[], nn.Module]
    wrong: float
    steps: int
    batch: int


TASKS = (
    Task(
        name="digits, MLP",
        data=lambda wrong: digits(700, 300, wrong),
        network=lambda: mlp(64, 128, 64, 10),
        wrong=0.4,
        steps=1000,
        batch=64,
    ),
    Task(
        name="Fashion-MNIST, CNN",
        data=lambda wrong: fashion(10_000, 1000, wrong=wrong, flat=False),
        network=cnn,
        wrong=0.4,
        steps=1560,
        batch=128,
    ),
)


class Fit(LightningModule):
    """A network and its loss, weighted if weights are tuned."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.example_weights: Any = None

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss."""
        x, y, index = batch
        losses = functional.cross_entropy(self.network(x), y, reduction="none")
        if self.example_weights is not None:
            losses = losses * self.example_weights(index)
        return losses.mean()

    def validation_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """Return the mean loss."""
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return logits in evaluation mode."""
        self.eval()
        return torch.cat([self.network(part) for part in x.split(500)])


def fit(
    task: Task, train: Pair, val: Pair, seed: int, *callbacks: Callback, steps: int | None = None
) -> tuple[Fit, float]:
    """Return a trained module and the CPU time of the fit."""
    seed_everything(seed, verbose=False)
    module = Fit(task.network())
    generator = torch.Generator().manual_seed(seed)
    data = TensorDataset(*train, torch.arange(len(train[0])))
    trainer = plain_trainer(steps or task.steps, callbacks)
    before = time.process_time()
    trainer.fit(
        module,
        DataLoader(data, task.batch, shuffle=True, drop_last=True, generator=generator),
        DataLoader(TensorDataset(*val), 1000, shuffle=True),
    )
    return module, time.process_time() - before


def run(task: Task, seed: int, *, only_ours: bool = False) -> dict[str, float]:
    """Return test accuracies, AUROC and costs of one seed."""
    train, val, test = task.data(task.wrong)(seed)
    right = task.data(0.0)(seed)[0]
    wrong = train[1] != right[1]

    def accuracy(module: Fit) -> float:
        return float((module.logits(test[0]).argmax(1) == test[1]).double().mean())

    plain, cost = fit(task, train, val, seed)
    found = {"plain": accuracy(plain)}
    if not only_ours:
        found["right"] = accuracy(fit(task, right, val, seed)[0])
        found["trusted"] = accuracy(fit(task, val, val, seed)[0])
        together = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
        found["together"] = accuracy(fit(task, together, val, seed)[0])
        young, first = fit(task, train, val, seed, steps=task.steps // 10)
        losses = functional.cross_entropy(young.logits(train[0]), train[1], reduction="none")
        kept = losses.argsort()[: int((~wrong).sum())]
        again, second = fit(task, (train[0][kept], train[1][kept]), val, seed)
        found |= {
            "small_loss": accuracy(again),
            "small_loss_auroc": auroc(-losses, ~wrong),
            "small_loss_cost": (first + second) / cost,
        }
    weights = ExampleWeights(len(wrong))
    tuned, ours = fit(task, train, val, seed, HypergradientCallback(weights))
    return found | {
        "ours": accuracy(tuned),
        "ours_auroc": auroc(weights.values()["weights"], ~wrong),
        "ours_cost": ours / cost,
    }


def rows(results: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """Return a row per task and seed, and one of medians."""
    percent = ("plain", "right", "trusted", "together", "small_loss", "ours")
    number, costs = ("small_loss_auroc", "ours_auroc"), ("small_loss_cost", "ours_cost")

    def row(name: str, label: str, entry: dict[str, float]) -> list[str]:
        cells = [f"{100 * entry[k]:.1f} %" if k in entry else "–" for k in percent]
        cells += [f"{entry[k]:.3f}" if k in entry else "–" for k in number]
        return [name, label, *cells, *(f"{entry[k]:.2f}" if k in entry else "–" for k in costs)]

    table = []
    for name, entries in results.items():
        table += [row(name, str(int(entry["seed"])), entry) for entry in entries]
        medians = {key: statistics.median(entry[key] for entry in entries) for key in entries[0]}
        table.append(row(name, "median", medians))
    return table


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Measure and print."""
    options = parser(__doc__, rounds=1)
    options.add_argument("--tasks", type=int, nargs="+", default=list(range(len(TASKS))))
    options.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options.add_argument("--only-ours", action="store_true", help="beside plain training")
    options.add_argument("--steps", type=int, help="of each fit; default: the task's own")
    arguments = options.parse_args(argv)
    start(arguments)
    before = load()
    quiet()
    results: dict[str, list[dict[str, float]]] = {}
    for task in (TASKS[i] for i in arguments.tasks):
        task = replace(task, steps=arguments.steps or task.steps)
        for seed in arguments.seeds:
            found = {"seed": float(seed), **run(task, seed, only_ours=arguments.only_ours)}
            results.setdefault(task.name, []).append(found)
            print(task.name, {key: round(value, 3) for key, value in found.items()}, flush=True)
    arms = ("plain", "right labels", "trusted alone", "trusted and noisy", "small loss", "one line")
    percent = [f"{name}, accuracy" for name in arms]
    rest = ["small loss, AUROC", "one line, AUROC", "small loss, cost", "one line, cost"]
    print_table(["task", "seed", *percent, *rest], rows(results))
    report(arguments, {"tasks": results}, load_before=before)
    return results


if __name__ == "__main__":
    main()
