"""A decay for each input feature: its closed form, and what it finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.datamodules import TabularDataModule
from lightning_nested.hyperparameters import FeatureDecay
from tests.hyperparameters.built import built
from tests.trainers import trainer


def test_it_is_half_the_weighted_squares_of_each_column() -> None:
    decay = built(FeatureDecay(3, init=0.5))
    weight = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    penalty = decay(weight)
    (slope, by_decay) = torch.autograd.grad(penalty, (weight, decay.tensors["decay"]))
    assert penalty.item() == pytest.approx(0.25 * (2 + 4 + 9), rel=1e-12)
    torch.testing.assert_close(slope, 0.5 * weight.detach())
    # By the logarithm of the decay.
    torch.testing.assert_close(by_decay, 0.25 * torch.tensor([2.0, 4.0, 9.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"shape \(outputs, 3\). Got \(3, 2\)"):
        decay(weight.T)
    with pytest.raises(ValueError, match="init must be positive"):
        FeatureDecay(3, init=0.0)


class Linear(LightningModule):
    feature_decay: FeatureDecay | None = None

    def __init__(self, features: int) -> None:
        super().__init__()
        self.net = nn.Linear(features, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.mse_loss(self.net(batch[0]), batch[1])
        return loss if self.feature_decay is None else loss + self.feature_decay(self.net.weight)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def test_columns_of_noise_get_the_larger_decays() -> None:
    data = TabularDataModule("diabetes", noise_columns=20, train_size=100, val_size=200, batch_size=50)
    decay = FeatureDecay(30)
    torch.manual_seed(0)
    callback = HypergradientCallback(decay, every_n_steps=2, warmup_steps=20)
    trainer(callback, max_epochs=-1, max_steps=200).fit(Linear(30), datamodule=data)
    assert callback.skipped_steps == 0
    found = decay.values()["decay"].log()
    # Half of the ten real columns say little themselves.
    assert float(found[data.noise].mean()) > float(found[~data.noise].mean()) + 0.3
