"""Weights of groups and a network of weights, tuned by the callback and by NestedModule's strategies."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import ConjugateGradient
from lightning_nested.hyperparameters import GroupWeights, WeightNetwork
from lightning_nested.modules import Implicit, LoopOptions, NestedModule, Unrolled
from tests.callbacks.exact import exact
from tests.trainers import trainer

NAMES = ["right", "wrong"]
SIZE = 64


def data(seed: int) -> TensorDataset:
    """Points in the plane whose label is the sign of their first coordinate; one training label in four is wrong."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SIZE, 2, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).long()
    group = (torch.arange(SIZE) % 4 == 0).long()
    return TensorDataset(x, torch.where(group == 1, 1 - y, y) if seed == 1 else y, group)


def adam(tensors: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(tensors, lr=0.05)


def sgd(tensors: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(tensors, lr=0.3)


class Weighted:
    """Losses of examples, weighted by what is tuned."""

    group_weights: GroupWeights | None = None
    weight_network: WeightNetwork | None = None
    net: nn.Module
    seen: Counter[int]

    def weighted(self, batch: Any) -> Tensor:
        x, y, group = batch
        self.seen.update(group.tolist())
        losses = functional.cross_entropy(self.net(x), y, reduction="none")
        if self.group_weights is not None:
            losses = losses * self.group_weights(group)
        if self.weight_network is not None:
            losses = self.weight_network(losses)
        return losses.mean() + 0.001 * sum(p.square().sum() for p in self.net.parameters())

    def outer_loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])


class Plain(Weighted, LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = nn.Linear(2, 2).double(), Counter()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weighted(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.outer_loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


class Nested(Weighted, NestedModule):
    def __init__(self, *tuned: Any, gradient: Any) -> None:
        super().__init__(
            list(tuned),
            inner_optimizer=sgd,
            outer_optimizer=adam,
            gradient=gradient,
            inner_steps_per_outer=3,
            loop=LoopOptions(warmup_steps=8),
        )
        self.net, self.seen = nn.Linear(2, 2).double(), Counter()

    def inner_loss(self, batch: Any) -> Tensor:
        return self.weighted(batch)


# A weight that falls with the loss makes the curvature indefinite.
CG = ConjugateGradient(max_iterations=6, damping=0.3)
WAYS: dict[str, Any] = {
    "callback": lambda h: (exact(h, solver=CG, optimizer=adam, warmup_steps=8), None),
    "planned": lambda h: (HypergradientCallback(h, every_n_steps=1, warmup_steps=8), None),
    "differences": lambda h: (exact(h, solver=CG, optimizer=adam, warmup_steps=8, train_batches=2), None),
    "implicit": lambda h: (None, Nested(h, gradient=Implicit(solver=CG))),
    "unrolled": lambda h: (None, Nested(h, gradient=Unrolled(num_steps=3))),
}


def fit(hyperparameter: Any, way: str, epochs: int = 12, sampler: Any = None) -> Any:
    """Tune it, and return the module; a wrong derivative is warned of, and warnings are errors here."""
    seed_everything(0, verbose=False)
    callback, nested = WAYS[way](hyperparameter)
    module = Plain() if nested is None else nested
    train = DataLoader(data(1), 16, shuffle=sampler is None, sampler=sampler)
    owner: Any = module if callback is None else callback
    made = trainer(
        *([] if callback is None else [callback]),
        max_epochs=epochs,
        limit_val_batches=0 if callback is None else 1.0,
    )
    made.fit(module, train, DataLoader(data(2), 32))
    assert owner.outer_steps > 10
    assert owner.skipped_steps == 0
    return module


@pytest.mark.parametrize(
    ("way", "sampled"),
    [("callback", False), ("planned", True), ("differences", True), ("implicit", True), ("unrolled", False)],
)
def test_a_wrong_group_loses_its_weight_and_is_drawn_less(way: str, sampled: bool) -> None:
    weights = GroupWeights(NAMES, shares=[3, 1])
    groups = data(1).tensors[2]
    module = fit(weights, way, sampler=weights.sampler(groups) if sampled else None)
    assert float(weights.values()["wrong"]) < 0.35
    share = module.seen[1] / (module.seen[0] + module.seen[1])
    # Half of what is drawn at first; a quarter of the data.
    assert share < 0.48 if sampled else share == pytest.approx(0.25)


@pytest.mark.parametrize("way", ["planned", "differences", "implicit", "unrolled"])
def test_a_weight_network_learns_that_large_losses_are_wrong_labels(way: str) -> None:
    network = WeightNetwork(hidden=8)
    fit(network, way)
    small, large = network.weights(torch.tensor([0.1, 3.0])).tolist()
    assert small > 1.02 > 0.98 > large
