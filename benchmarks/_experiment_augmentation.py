"""An augmentation network learned within one fit on few images, beside none and standard augmentation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested import (
    Current,
    FashionMNISTDataModule,
    HypergradientCallback,
    ImageClassifier,
    Neumann,
)
from lightning_nested.networks import AugmentationNetwork

BATCH = 50


class Standard(nn.Module):
    """Shifts by up to one pixel and mirror images."""

    def forward(self, images: Tensor) -> Tensor:
        """Return images that are changed at random, each in its own way."""
        count, side = len(images), images.shape[-1]
        padded = nn.functional.pad(images, (1, 1, 1, 1))
        rows, columns = torch.randint(3, (2, count, 1)) + torch.arange(side)
        moved = padded[
            torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]
        ].unsqueeze(1)
        return torch.where(torch.rand(count, 1, 1, 1) < 0.5, moved.flip(-1), moved)


@dataclass
class Given:
    """Images of one seed."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    seed: int
    steps: int

    def fit(self, *callbacks: Callback, both: bool = False, augmentation: nn.Module | None = None) -> Numbers:
        """Return what a trained classifier scores on test images, with the CPU time of the fit."""
        seed_everything(self.seed, verbose=False)
        train = (
            tuple(torch.cat(parts) for parts in zip(self.train, self.val, strict=True))
            if both
            else self.train
        )
        # The same number of steps, whatever is trained on.
        epochs = self.steps * BATCH // len(train[0])
        module = ImageClassifier(
            "cnn", input_shape=(1, 14, 14), network_options={"width": 8}, augmentation=augmentation,
            optimizer=partial(torch.optim.Adam, lr=3e-3),
            scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
        )  # fmt: skip
        loader = DataLoader(TensorDataset(*train), batch_size=BATCH, shuffle=True)
        before = time.process_time()
        plain_trainer(self.steps, callbacks).fit(
            module, loader, DataLoader(TensorDataset(*self.val), 250, shuffle=True)
        )
        seconds = time.process_time() - before
        module.eval()
        with torch.no_grad():
            logits = torch.cat([module(part) for part in self.test[0].split(500)])
        right = (logits.argmax(1) == self.test[1]).float().mean()
        return {
            "accuracy": float(right),
            "loss": float(cross_entropy(logits, self.test[1])),
            "seconds": seconds,
        }


def prepare(train: int, steps: int) -> Callable[[int, str], Given]:
    """Return the function that draws so many images to train on, and 500 to validate."""

    def given(seed: int, size: str) -> Given:
        smoke = size == "smoke"
        count, val, test = (100, 100, 100) if smoke else (train, 500, 10_000)
        data = FashionMNISTDataModule(train_size=count, val_size=val, seed=seed)
        data.setup()
        parts = (
            (nn.functional.avg_pool2d(images, 2), labels)
            for images, labels in (
                (data.train_images, data.train_labels),
                (data.val_images, data.val_labels),
                (data.test_images[:test], data.test_labels[:test]),
            )
        )
        return Given(*parts, seed, 4 if smoke else steps)

    return given


def learned(**options: Any) -> Callable[[Given], Numbers]:
    """Return the arm that learns the augmentation network by the validation images."""

    def arm(given: Given) -> Numbers:
        seed_everything(given.seed, verbose=False)
        tuner = HypergradientCallback("augmentation", **options)
        return given.fit(tuner, augmentation=AugmentationNetwork(width=4))

    return arm


def experiment(train: int, steps: int, **options: Any) -> Experiment:
    """Return the experiment of so many images and steps, with options of the callback."""
    return Experiment(
        question=f"Fashion-MNIST at 14 × 14 pixels, {train} images to train on and 500 for validation, small CNN "
        f"(4 k weights), {steps} steps of Adam on a cosine, no decay",
        prepare=prepare(train, steps),
        arms={
            "none": lambda given: given.fit(),
            "none, trained on the validation images too": lambda given: given.fit(both=True),
            "standard: shifts by a pixel, mirror images": lambda given: given.fit(augmentation=Standard()),
            "augmentation network": learned(**options),
        },
        columns={"accuracy": Column(title="test accuracy", percent=True), "loss": Column(title="test loss")},
        seeds=(10, 11, 12),
    )


AUGMENTATION = experiment(500, 600, optimizer=partial(torch.optim.Adam, lr=1e-3), every_n_steps=9)
AUGMENTATION_FEW = experiment(
    200,
    2000,
    optimizer=partial(torch.optim.Adam, lr=5e-3),
    every_n_steps=18,
    at=Current(),
    solver=Neumann(num_terms=5),
)
