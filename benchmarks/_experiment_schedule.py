"""A learning rate that the outer loss lowers, beside cosine from the same rate: Fashion-MNIST, AdamW and SGD."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested import HypergradientCallback, LearningRate
from lightning_nested.datamodules import FashionMNISTDataModule

Pair = tuple[Tensor, Tensor]


class Network(LightningModule):
    """An MLP with an optimizer, and perhaps a cosine schedule."""

    def __init__(self, optimizer: str, rate: float, steps: int | None) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
        self.kind, self.rate, self.steps = optimizer, rate, steps

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with cosine to zero if it has steps."""
        if self.kind == "sgd":
            optimizer: Any = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate)
        if self.steps is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def score(self, data: Pair) -> tuple[float, float]:
        """Return loss and accuracy on whole data."""
        out = self.network(data[0])
        return float(functional.cross_entropy(out, data[1])), float((out.argmax(1) == data[1]).float().mean())


@dataclass
class Given:
    """Data of one seed: of the held-out examples, one half is for outer steps and the other is reported."""

    train: Pair
    outer: Pair
    val: Pair
    test: Pair
    seed: int
    optimizer: str
    rate: float
    steps: int

    def fit(self, *callbacks: Callback, cosine: bool = False, factor: float = 1.0) -> Numbers:
        """Train, and score."""
        seed_everything(self.seed, verbose=False)
        module = Network(self.optimizer, factor * self.rate, self.steps if cosine else None)
        train = DataLoader(TensorDataset(*self.train), 64, shuffle=True, drop_last=True)
        before = time.process_time()
        plain_trainer(self.steps, callbacks).fit(
            module, train, DataLoader(TensorDataset(*self.outer), 200, shuffle=True)
        )
        seconds = time.process_time() - before
        module.eval()
        (val, _), (loss, accuracy) = module.score(self.val), module.score(self.test)
        return {"val": val, "loss": loss, "accuracy": accuracy, "seconds": seconds}


def prepare(optimizer: str, rate: float) -> Callable[[int, str], Given]:
    """Return the function that draws 10 000 images, 2 000 held-out ones for outer steps and 2 000 for validation."""

    def given(seed: int, size: str) -> Given:
        source = FashionMNISTDataModule(train_size=10000, val_size=4000, seed=seed)
        source.prepare_data()
        source.setup("fit")
        source.setup("test")
        mean, scale = source.train_images.mean(), source.train_images.std()
        train, held, test = (
            ((x - mean) / scale, y)
            for x, y in (
                (source.train_images, source.train_labels),
                (source.val_images, source.val_labels),
                (source.test_images, source.test_labels),
            )
        )
        outer, val = ((held[0][part], held[1][part]) for part in (slice(2000), slice(2000, None)))
        return Given(train, outer, val, test, seed, optimizer, rate, 40 if size == "smoke" else 800)

    return given


def tuned(
    given: Given, *, cosine: bool = False, factor: float = 1.0, warmup: float | None = None, horizon: int = 1
) -> Numbers:
    """Tune the rate, after a share of the run."""
    steps = None if warmup is None else int(warmup * given.steps)
    callback = HypergradientCallback(LearningRate(horizon=horizon), warmup_steps=steps)
    return given.fit(callback, cosine=cosine, factor=factor)


def constant(given: Given, *, factor: float = 1.0) -> Numbers:
    """Keep the rate."""
    return given.fit(factor=factor)


def cosine(given: Given, *, factor: float = 1.0) -> Numbers:
    """Lower the rate by a cosine to zero."""
    return given.fit(cosine=True, factor=factor)


ARMS: dict[str, Callable[[Given], Numbers]] = {
    "constant": constant,
    "cosine": cosine,
    "learned, from 70 % on (default)": tuned,
    "learned, from 10 % on": partial(tuned, warmup=0.1),
    "learned, from 70 % on, horizon 4": partial(tuned, horizon=4),
    "cosine, and learned": partial(tuned, cosine=True),
    "rate × 3: cosine": partial(cosine, factor=3.0),
    "rate × 3: learned": partial(tuned, factor=3.0),
    "rate × 3: learned, from 10 % on": partial(tuned, factor=3.0, warmup=0.1),
    "rate / 3: cosine": partial(cosine, factor=1 / 3),
    "rate / 3: learned": partial(tuned, factor=1 / 3),
    "rate / 3: learned, from 10 % on": partial(tuned, factor=1 / 3, warmup=0.1),
}
COLUMNS = {
    "val": Column(title="validation loss"),
    "loss": Column(title="test loss"),
    "accuracy": Column(title="test accuracy", percent=True),
}
SCHEDULE_ADAMW, SCHEDULE_SGD = (
    Experiment(
        question=(
            f"Fashion-MNIST, 10 000 images, MLP 784-64-10, 800 steps of {title}: a learned rate against cosine. "
            "Outer steps see 2 000 held-out images, the validation loss is of 2 000 others"
        ),
        prepare=prepare(kind, rate),
        arms=ARMS,
        columns=COLUMNS,
        # Others had been run with an earlier design.
        seeds=(20, 21, 22, 23, 24),
    )
    for kind, rate, title in (
        ("adamw", 3e-3, "AdamW, rate 3e-3"),
        ("sgd", 0.03, "SGD, momentum 0.9, rate 0.03"),
    )
)
