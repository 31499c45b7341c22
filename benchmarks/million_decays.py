"""What a decay for each of a million weights costs: time and memory of a whole fit, beside plain training.

Each fit has a process of its own: CPU time of the fit, and the largest resident memory of the process beyond what it
held before the fit, model and data included.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from _fits import plain_trainer, quiet
from _measuring import load, parser, print_table, report, start
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested import HypergradientCallback, WeightDecay

ARMS = ("plain", "a decay per tensor", "a decay per weight")


class Fit(LightningModule):
    """A network of a million weights on inputs of 784 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 215), nn.ReLU(), nn.Linear(215, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss."""
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss."""
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the inner optimizer."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def fit(arm: str, seed: int, steps: int, threads: int, sender: Any) -> None:
    """Send CPU seconds of a fit, MiB that it took beyond what was there, and MiB of the process."""
    torch.set_num_threads(threads)
    quiet()
    seed_everything(seed, verbose=False)
    x, y = torch.randn(4000, 784), torch.randint(0, 10, (4000,))
    train = DataLoader(TensorDataset(x[:3000], y[:3000]), 64, shuffle=True, drop_last=True)
    val = DataLoader(TensorDataset(x[3000:], y[3000:]), 64, shuffle=True)
    per = {"a decay per tensor": "tensor", "a decay per weight": "parameter"}.get(arm)
    callbacks = [HypergradientCallback(WeightDecay(per=per))] if per else []  # type: ignore[arg-type]
    module = Fit()
    trainer = plain_trainer(steps, callbacks)
    peak, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    trainer.fit(module, train, val)
    seconds = time.process_time() - seconds
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sender.send((seconds, (after - peak) / 1024, after / 1024))


def measured(arm: str, seed: int, steps: int, threads: int) -> tuple[float, float, float]:
    """Return what :func:`fit` sends, from a new process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=fit, args=(arm, seed, steps, threads, sender))
    process.start()
    sender.close()
    found: tuple[float, float, float] = receiver.recv()
    process.join()
    return found


def main(given: Sequence[str] | None = None) -> dict[str, list[tuple[float, float, float]]]:
    """Measure and print; return what each fit sent."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--steps", type=int, default=600)
    arguments = options.parse_args(given)
    start(arguments)
    before = load()
    found: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in ARMS}
    for seed in range(arguments.rounds):
        for arm in ARMS:
            found[arm].append(measured(arm, seed, arguments.steps, arguments.threads))
            print(arm, json.dumps(found[arm][-1]), flush=True)
    rows = []
    for arm, runs in found.items():
        ratios = [r[0] / p[0] for r, p in zip(runs, found["plain"], strict=True)]
        rows.append(
            [
                arm,
                f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
                *(f"{statistics.median(r[i] for r in runs):.0f}" for i in (1, 2)),
            ]
        )
    print_table(["fit", "CPU time / plain", "MiB of the fit", "MiB of the process"], rows)
    report(arguments, {"runs": found}, load_before=before)
    return found


if __name__ == "__main__":
    main()
