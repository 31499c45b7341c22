"""What HypergradientCallback costs per training step on steps where it does nothing.

A small MLP on digits-sized inputs under a real Trainer, three ways in the same rounds: no callback, an
empty callback with the four hooks that ours uses in every step, and ours while it waits for its first outer
step.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _measuring import Spread, clock, load, parser, print_table, report, start
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import Current, Neumann
from lightning_nested.hyperparameters import WeightDecay


class Model(LightningModule):
    """64-32-10, so that a step is mostly the Trainer's own time."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The same."""
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Empty(Callback):
    """The four hooks of a step, with nothing in them."""

    def on_train_batch_start(self, *_: Any) -> None:
        """Nothing."""

    def on_before_backward(self, *_: Any) -> None:
        """Nothing."""

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Nothing."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Nothing."""


class Stopwatch(Callback):
    """Time of the steps after the first few, so that no start-up is counted."""

    def __init__(self, now: Callable[[], float], skip: int, last: int) -> None:
        self._now, self._skip, self._last, self.elapsed = now, skip, last, 0.0
        self._steps = 0

    def on_train_batch_start(self, *_: Any) -> None:
        """The first step that counts."""
        if self._steps == self._skip:
            self._start = self._now()
        self._steps += 1
        if self._steps == self._last:
            self.elapsed = (self._now() - self._start) / (self._last - self._skip - 1)


_HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def inside(callback: Callback, steps: int, now: Callable[[], float]) -> float:
    """Median time of a training step that passes inside the hooks of a callback: free of a drift of the machine."""
    spent = [0.0]

    def timed(hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            begin = now()
            found = hook(*args, **options)
            spent[-1] += now() - begin
            return found

        return call

    for name in _HOOKS:
        setattr(callback, name, timed(getattr(callback, name)))
    last = callback.on_train_batch_end

    def end(*args: Any, **options: Any) -> None:
        last(*args, **options)
        spent.append(0.0)

    callback.on_train_batch_end = end  # type: ignore[method-assign]
    microseconds([callback], steps, now)
    return 1e6 * statistics.median(spent[50:-1])


def microseconds(callbacks: Sequence[Callback], steps: int, now: Callable[[], float]) -> float:
    """Mean time of a training step."""
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(64, 64), torch.randint(0, 10, (64,)))
    # Collation costs as much as a step: batches are ready.
    batches = [(data.tensors[0][i : i + 16], data.tensors[1][i : i + 16]) for i in range(0, 64, 16)]
    loader = DataLoader(batches * (-(-steps // 4)), batch_size=None)  # type: ignore[arg-type]
    watch = Stopwatch(now, skip=50, last=steps)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[watch, *callbacks],
    )
    trainer.fit(Model(), loader, DataLoader(data, batch_size=16))
    return 1e6 * watch.elapsed


def main(argv: Sequence[str] | None = None) -> dict[str, Spread]:
    options = parser(__doc__, rounds=9)
    options.add_argument("--steps", type=int, default=1500)
    arguments: argparse.Namespace = options.parse_args(argv)
    start(arguments)
    before = load()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    def waiting(per: str, **schedule: int) -> HypergradientCallback:
        decay = WeightDecay(per=per, init=1e-4, include=["*"])  # type: ignore[arg-type]
        return HypergradientCallback(decay, at=Current(), solver=Neumann(), every_n_steps=1, **schedule)

    never = 10**9
    makers: dict[str, Callable[[], list[Callback]]] = {
        "empty callback, four hooks": lambda: [Empty()],
        "ours, warming up, one decay": lambda: [waiting("model", warmup_steps=never)],
        "ours, warming up, a decay per tensor": lambda: [waiting("tensor", warmup_steps=never)],
        "ours, warming up, a decay per weight": lambda: [waiting("parameter", warmup_steps=never)],
    }
    now = clock(arguments.threads)
    cost: dict[str, list[float]] = {name: [] for name in makers}
    base: list[float] = []
    microseconds([Empty()], arguments.steps, now)
    gc.collect()
    gc.disable()
    for _ in range(arguments.rounds):
        for name, make in makers.items():
            # None before and after each contestant: a drift of the machine cancels.
            first = microseconds([], arguments.steps, now)
            time = microseconds(make(), arguments.steps, now)
            second = microseconds([], arguments.steps, now)
            base.append(statistics.mean((first, second)))
            cost[name].append(time - base[-1])
            gc.collect()
    gc.enable()
    hooks = [
        inside(makers["ours, warming up, one decay"]()[0], arguments.steps, now)
        for _ in range(arguments.rounds)
    ]
    results = {"a step without callback": Spread.of(base), **{n: Spread.of(c) for n, c in cost.items()}}
    results["inside the hooks of ours, one decay"] = Spread.of(hooks)
    rows = [[name, spread.text(0)] for name, spread in results.items()]
    print_table(["", "µs per step, callbacks beyond none [quartiles]"], rows)
    print("\nReach: ours <= 250 µs.")
    report(arguments, results, packages=(), load_before=before)
    return results


if __name__ == "__main__":
    main()
