"""Wrong labels by the influence of each example, beside a loss ranking and a weight per example."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _arms import Column, Experiment, Numbers, auroc
from _fits import plain_trainer
from lightning.pytorch import Callback, seed_everything
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested import (
    ConjugateGradient,
    DigitsDataModule,
    ExampleWeights,
    HypergradientCallback,
    ImageClassifier,
    influence,
)
from lightning_nested.hypergradient import InverseSolver


@dataclass
class Given:
    """Data, and the fits of a seed."""

    data: DigitsDataModule
    seed: int
    steps: int

    def fit(self, steps: int, *callbacks: Callback) -> tuple[ImageClassifier, float]:
        """Return a trained classifier and the CPU time of the fit."""
        seed_everything(self.seed, verbose=False)
        module = ImageClassifier(
            "mlp", network_options={"hidden": [128, 64]}, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3)
        )
        before = time.process_time()
        plain_trainer(steps, callbacks).fit(module, datamodule=self.data)
        return module.eval(), time.process_time() - before

    def numbers(self, scores: Tensor, seconds: float) -> Numbers:
        """Return how well low scores tell wrong labels."""
        wrong = self.data.wrong
        lowest = wrong[scores.argsort()[: int(wrong.sum())]]
        return {"auroc": auroc(scores, ~wrong), "caught": float(lowest.float().mean()), "seconds": seconds}


def prepare(seed: int, size: str) -> Given:
    """Return digits of which 40 % have a wrong label."""
    data = DigitsDataModule(
        wrong_label_fraction=0.4,
        with_index=True,
        batch_size=64,
        val_batch_size=300,
        drop_last=True,
        seed=seed,
    )
    data.setup()
    return Given(data, seed, 20 if size == "smoke" else 100)


def by_loss(length: int) -> Callable[[Given], Numbers]:
    """Return the arm that ranks by the loss after a fit of this length."""

    def arm(given: Given) -> Numbers:
        module, seconds = given.fit(length * given.steps)
        data = given.data
        with torch.no_grad():
            losses = functional.cross_entropy(module(data.train_images), data.train_labels, reduction="none")
        return given.numbers(-losses, seconds)

    return arm


def by_influence(length: int, solver: InverseSolver | None = None) -> Callable[[Given], Numbers]:
    """Return the arm that ranks by influence with this solver, after a fit of this length."""

    def arm(given: Given) -> Numbers:
        module, seconds = given.fit(length * given.steps)
        data = given.data
        train = DataLoader(TensorDataset(data.train_images, data.train_labels), 350)
        before = time.process_time()
        scores = influence(module, train, [(data.val_images, data.val_labels)], solver=solver)
        return given.numbers(scores, seconds + time.process_time() - before)

    return arm


def by_weights(given: Given) -> Numbers:
    """Rank by weights that were tuned over ten times the length."""
    weights = ExampleWeights(len(given.data.wrong))
    _, seconds = given.fit(10 * given.steps, HypergradientCallback(weights))
    return given.numbers(weights.values()["weights"], seconds)


INFLUENCE = Experiment(
    question="700 digits, 40 % wrong labels, 300 right ones to validate: which score tells wrong labels?",
    prepare=prepare,
    arms={
        "loss, after 100 steps": by_loss(1),
        "influence, Kronecker factors, after 100 steps": by_influence(1),
        "influence, conjugate gradient, after 100 steps": by_influence(
            1, ConjugateGradient(max_iterations=30, damping=0.1)
        ),
        "loss, after 1 000 steps": by_loss(10),
        "influence, Kronecker factors, after 1 000 steps": by_influence(10),
        "example weights, over 1 000 steps": by_weights,
    },
    columns={
        "auroc": Column(title="AUROC"),
        "caught": Column(title="wrong among as many lowest", percent=True),
    },
)
