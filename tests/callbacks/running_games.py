"""Games in short runs, for the tests of callbacks that measure them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.demos import ZooGame
from lightning_nested.games import Bilinear
from lightning_nested.modules import GANModule
from lightning_nested.optim import (
    ComplexAdam,
    ComplexSGD,
)
from tests import trainers

Optimizer = Callable[[Any], torch.optim.Optimizer]


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """Return a silent Trainer that stops after four game updates, unless options say otherwise."""
    return trainers.trainer(*callbacks, **{"max_epochs": -1, "max_steps": 4, **options})


def zoo(game: Any = None, optimizer: Optimizer | None = None, **options: Any) -> ZooGame:
    options = {"update": "simultaneous", "start": [[1.0], [1.0]], **options}
    return ZooGame(game or Bilinear(), optimizer=optimizer or (lambda p: ComplexSGD(p, lr=0.1)), **options)


def mlp(inputs: int, outputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()


class GAN(GANModule):
    """Latents come with the batch."""

    def __init__(self, optimizer: Optimizer | None = None, hidden: int = 4, **options: Any) -> None:
        torch.manual_seed(0)
        optimizer = optimizer or (lambda p: ComplexAdam(p, lr=0.01, betas=(0.7, 0.9)))
        super().__init__(mlp(2, 2, hidden), mlp(2, 1, hidden), latent_dim=2, optimizer=optimizer, **options)

    def player_loss(self, name: str, batch: Any) -> Tensor:
        self.latents = batch[0][:, 2:]
        return super().player_loss(name, (batch[0][:, :2],))

    def sample_latents(self, count: int) -> Tensor:
        return self.latents


def points(n: int = 40) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def loader(size: int = 10) -> DataLoader[Any]:
    return DataLoader(TensorDataset(points()), size)
