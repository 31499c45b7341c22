"""Digits and Fashion-MNIST distilled to one image per class: fresh networks, with restarts and without."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from lightning.pytorch import seed_everything

from lightning_nested import DigitsDataModule, DistillationModule, FashionMNISTDataModule
from lightning_nested.datamodules.in_memory import InMemoryDataModule
from lightning_nested.demos.distillation_report import tested


@dataclass
class Given:
    """Data of a seed, and the length of a run."""

    data: InMemoryDataModule
    seed: int
    steps: int
    networks: int
    inner_rate: float

    def module(self, **options: Any) -> DistillationModule:
        """Return images to learn, as many as classes, and a network of 64 units."""
        seed_everything(self.seed, verbose=False)
        return DistillationModule(
            network_options={"hidden": [64]},
            input_shape=tuple(self.data.train_images.shape[1:]),
            inner_rate=self.inner_rate,
            **options,
        )


def digits(seed: int, size: str) -> Given:
    """Return 1 000 digits to learn from; 597 test."""
    data = DigitsDataModule(train_size=1000, val_size=200, batch_size=250, seed=seed)
    data.setup()
    return Given(data, seed, *((8, 1) if size == "smoke" else (240, 5)), 0.5)


def fashion(seed: int, size: str) -> Given:
    """Return 50 000 images of clothes to learn from; 10 000 test."""
    smoke = size == "smoke"
    data = FashionMNISTDataModule(
        train_size=500 if smoke else 50_000, val_size=200, batch_size=500, seed=seed, drop_last=True
    )
    data.setup()
    return Given(data, seed, *((2, 1) if smoke else (300, 5)), 0.1)


def arm(restart_every: int | None) -> Any:
    """Return an arm that distills, and tests fresh networks and its own."""

    def run(given: Given) -> Numbers:
        module = given.module(restart_every=restart_every)
        trainer = plain_trainer(given.steps, gradient_clip_val=1.0)
        before = time.process_time()
        trainer.fit(module, datamodule=given.data)
        seconds = time.process_time() - before
        fresh = [tested(trainer, module, seed) for seed in range(given.networks)]
        with torch.no_grad():
            own = (module(given.data.test_images).argmax(1) == given.data.test_labels).float().mean()
        return {"fresh": statistics.median(fresh), "own": float(own), "seconds": seconds}

    return run


def on_real_images(given: Given) -> Numbers:
    """Train on one real image of each class in place of the learned ones."""
    module = given.module()
    first = [int((given.data.train_labels == c).nonzero()[0]) for c in range(10)]
    with torch.no_grad():
        module.images.copy_(given.data.train_images[first])
    trainer = plain_trainer(1)
    trainer.limit_train_batches = 0
    trainer.fit(module, datamodule=given.data)
    return {"fresh": statistics.median(tested(trainer, module, seed) for seed in range(given.networks))}


ARMS = {
    "fresh weights at every step": arm(1),
    "every 10 steps": arm(10),
    "never: warm-started": arm(None),
    "ten real images": on_real_images,
}
COLUMNS = {
    "fresh": Column(title="fresh networks", percent=True),
    "own": Column(title="the run's own", percent=True),
}
DISTILLATION = Experiment(
    question="1 000 digits distilled to 10 images, MLP 64-64-10, 20 inner steps, 240 outer ones: test accuracy of "
    "networks trained on the images alone (median of five fresh ones)",
    prepare=digits,
    arms=ARMS,
    columns=COLUMNS,
)
DISTILLATION_FASHION = Experiment(
    question="50 000 images of Fashion-MNIST distilled to 10, MLP 784-64-10, 20 inner steps, 300 outer ones: test "
    "accuracy of networks trained on the images alone (median of five fresh ones)",
    prepare=fashion,
    arms=ARMS,
    columns=COLUMNS,
)
