"""Fifty images to train on and fifty to validate: can a decay for each weight fit the validation images too?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested import (
    ConjugateGradient,
    Current,
    FashionMNISTDataModule,
    HypergradientCallback,
    ImageClassifier,
    Neumann,
    WeightDecay,
)
from lightning_nested.hypergradient import InverseSolver


def linear() -> nn.Module:
    """Return 7 850 weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def mlp() -> nn.Module:
    """Return 39 760 weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))


def cnn() -> nn.Module:
    """Return two convolutions and a linear layer on 784 features, 9 098 weights."""
    first, second = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(784, 10))


@dataclass
class Given:
    """Images of one seed, and the length of a run."""

    data: FashionMNISTDataModule
    seed: int
    steps: int

    def fit(self, network: Callable[[], nn.Module], solver: InverseSolver | None, rate: float) -> Numbers:
        """Train, with a decay for each weight if there is a solver; return accuracies and the validation loss."""
        seed_everything(self.seed, verbose=False)
        module = ImageClassifier(network(), optimizer=lambda found: torch.optim.Adam(found, lr=1e-3))
        callbacks = []
        if solver is not None:
            callbacks = [
                HypergradientCallback(
                    WeightDecay(per="parameter", init=1e-3),
                    at=Current(),
                    solver=solver,
                    optimizer=lambda found: torch.optim.Adam(found, lr=rate),
                    every_n_steps=10,
                    warmup_steps=min(200, self.steps // 2),
                )
            ]
        before = time.process_time()
        plain_trainer(self.steps, callbacks).fit(module, datamodule=self.data)
        seconds = time.process_time() - before
        data = self.data
        return {
            "train": accuracy(module, data.train_images, data.train_labels),
            "val": accuracy(module, data.val_images, data.val_labels),
            "loss": float(cross_entropy(module(data.val_images), data.val_labels)),
            "test": accuracy(module, data.test_images, data.test_labels),
            "seconds": seconds,
        }

    def fit_all(self, network: Callable[[], nn.Module]) -> Numbers:
        """Train on the validation images too, without a decay; return accuracies on training and test images."""
        seed_everything(self.seed, verbose=False)
        module = ImageClassifier(network(), optimizer=lambda found: torch.optim.Adam(found, lr=1e-3))
        data = self.data
        images = torch.cat([data.train_images, data.val_images])
        labels = torch.cat([data.train_labels, data.val_labels])
        rows = torch.arange(len(labels))
        before = time.process_time()
        plain_trainer(self.steps).fit(module, DataLoader(TensorDataset(images, labels, rows), len(labels)))
        seconds = time.process_time() - before
        return {
            "train": accuracy(module, images, labels),
            "test": accuracy(module, data.test_images, data.test_labels),
            "seconds": seconds,
        }


@torch.no_grad()
def accuracy(module: ImageClassifier, images: Tensor, labels: Tensor) -> float:
    """Return the share that is classified right."""
    module.eval()
    return float((module(images).argmax(1) == labels).float().mean())


def prepare(seed: int, size: str) -> Given:
    """Return fifty images to train on, fifty to validate and 10 000 to test."""
    data = FashionMNISTDataModule(train_size=50, val_size=50, batch_size=50, seed=seed)
    data.setup()
    return Given(data, seed, 20 if size == "smoke" else 2_500)


def plain(network: Callable[[], nn.Module]) -> Callable[[Given], Numbers]:
    """Return the arm without decays."""
    return lambda given: given.fit(network, None, 0.0)


def on_both(network: Callable[[], nn.Module]) -> Callable[[Given], Numbers]:
    """Return the arm that trains on all images: what those that validate say without a decay."""
    return lambda given: given.fit_all(network)


def tuned(network: Callable[[], nn.Module], solver: InverseSolver, rate: float) -> Callable[[Given], Numbers]:
    """Return the arm of a decay for each weight."""
    return lambda given: given.fit(network, solver, rate)


TERMS, GRADIENTS = Neumann(num_terms=5), ConjugateGradient(max_iterations=20, damping=1e-3)
OVERFIT = Experiment(
    question="Fashion-MNIST, 50 images to train on and 50 to validate, 2 500 whole-batch steps of Adam: do decays "
    "that are tuned on the validation images fit those too?",
    prepare=prepare,
    arms={
        "linear, no decay": plain(linear),
        "linear, trained on both": on_both(linear),
        "linear, a decay per weight": tuned(linear, TERMS, 0.1),
        "MLP, no decay": plain(mlp),
        "MLP, trained on both": on_both(mlp),
        "MLP, a decay per weight": tuned(mlp, TERMS, 0.1),
        "CNN, no decay": plain(cnn),
        "CNN, a decay per weight": tuned(cnn, TERMS, 0.1),
        "CNN, steps of 0.03": tuned(cnn, TERMS, 0.03),
        "CNN, steps of 0.03, conjugate gradient": tuned(cnn, GRADIENTS, 0.03),
    },
    columns={
        "train": Column(title="training accuracy", percent=True),
        "val": Column(title="validation accuracy", percent=True),
        "loss": Column(title="validation loss"),
        "test": Column(title="test accuracy", percent=True),
    },
)
