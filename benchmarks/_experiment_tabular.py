"""Tables with columns of noise: many regularizers within one fit, beside searches for one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested import FeatureDecay, HypergradientCallback, TabularDataModule, WeightDecay


class Table(LightningModule):
    """An MLP on a table, with a decay for each input feature if one is tuned."""

    feature_decay: Any = None

    def __init__(self, features: int, outputs: int, decay: float) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(features, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, outputs)
        )
        self.decay = decay

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Return cross-entropy, or the mean squared error."""
        out = self.network(batch[0])
        return (
            functional.mse_loss(out, batch[1])
            if batch[1].is_floating_point()
            else functional.cross_entropy(out, batch[1])
        )

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss, with the decay of the features."""
        loss = self.loss(batch)
        return loss if self.feature_decay is None else loss + self.feature_decay(self.network[0].weight)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3, weight_decay=self.decay)

    @torch.no_grad()
    def score(self, inputs: Tensor, target: Tensor) -> float:
        """Return the loss on whole data."""
        self.eval()
        return float(self.loss((inputs, target)))


@dataclass
class Given:
    """A table of one seed."""

    data: TabularDataModule
    seed: int
    steps: int

    def fit(self, *callbacks: Callback, decay: float = 0.0) -> tuple[Table, float]:
        """Return a trained network and the CPU time of the fit."""
        seed_everything(self.seed, verbose=False)
        module = Table(self.data.num_features, self.data.num_classes or 1, decay)
        before = time.process_time()
        plain_trainer(self.steps, callbacks).fit(module, datamodule=self.data)
        return module, time.process_time() - before

    def numbers(self, module: Table, seconds: float, decays: Tensor | None = None) -> Numbers:
        """Return the test loss, and how well large decays tell columns of noise."""
        found = {"loss": module.score(self.data.test_inputs, self.data.test_target), "seconds": seconds}
        if decays is not None:
            from sklearn.metrics import roc_auc_score

            found["auroc"] = float(roc_auc_score(self.data.noise.numpy(), decays.double().numpy()))
        return found


def prepare(source: str, noise: int, train: int, val: int) -> Callable[[int, str], Given]:
    """Return the function that draws a table."""

    def given(seed: int, size: str) -> Given:
        data = TabularDataModule(source, noise_columns=noise, train_size=train, val_size=val, seed=seed)
        data.setup()
        return Given(data, seed, 40 if size == "smoke" else 800)

    return given


def plain(given: Given) -> Numbers:
    """Train without a decay."""
    module, seconds = given.fit()
    # Without tuned decays, the columns' weights say what the network ignores.
    return given.numbers(module, seconds, -module.network[0].weight.detach().square().sum(0))


def searched(trials: int) -> Callable[[Given], Numbers]:
    """Return the arm that draws one decay at random in each trial, and keeps the best on validation data."""

    def arm(given: Given) -> Numbers:
        generator = torch.Generator().manual_seed(given.seed)
        total, best = 0.0, (math.inf, None)
        for _ in range(trials if given.steps > 100 else 2):
            decay = 10 ** float(-5 + 5 * torch.rand((), generator=generator))
            module, seconds = given.fit(decay=decay)
            loss, total = module.score(given.data.val_inputs, given.data.val_target), total + seconds
            best = min(best, (loss, module), key=lambda pair: pair[0])
        assert best[1] is not None
        return given.numbers(best[1], total)

    return arm


def one_decay(given: Given) -> Numbers:
    """Tune a decay per tensor."""
    module, seconds = given.fit(HypergradientCallback(WeightDecay()))
    return given.numbers(module, seconds)


def every_weight(given: Given) -> Numbers:
    """Tune a decay per weight."""
    decay = WeightDecay(per="parameter")
    module, seconds = given.fit(HypergradientCallback(decay))
    return given.numbers(module, seconds, decay.values()["network.0.weight"].log().mean(0))


def features(given: Given) -> Numbers:
    """Tune a decay per feature and one per later tensor."""
    decay = FeatureDecay(given.data.num_features)
    layers = WeightDecay(exclude=["*.bias", "network.0.weight"])
    module, seconds = given.fit(HypergradientCallback([decay, layers]))
    return given.numbers(module, seconds, decay.values()["decay"].log())


ARMS = {
    "plain": plain,
    "random search, 8 trainings, one decay": searched(8),
    "a decay per tensor, one fit": one_decay,
    "a decay per weight, one fit": every_weight,
    "a decay per feature and layer, one fit": features,
}
COLUMNS = {"loss": Column(title="test loss"), "auroc": Column(title="AUROC of noise columns")}
BREAST_CANCER = Experiment(
    question="Breast cancer, 30 columns and 100 of noise, 220 rows to train on, MLP 130-48-48-2, 800 steps of Adam",
    prepare=prepare("breast_cancer", 100, 220, 110),
    arms=ARMS,
    columns=COLUMNS,
)
DIABETES = Experiment(
    question="Diabetes, 10 columns and 40 of noise, 200 rows to train on, MLP 50-48-48-1, 800 steps of Adam",
    prepare=prepare("diabetes", 40, 200, 100),
    arms=ARMS,
    columns=COLUMNS,
)
