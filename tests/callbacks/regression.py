"""A small regression in a LightningModule, with its data and optimizers."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.cases import DOUBLE

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


class Regression(LightningModule):
    """Half the mean squared error of a small network."""

    def __init__(self, net: nn.Module, optimizer: Any = OPTIMIZERS["sgd"]) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        loss = 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean()
        self.log("train", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def data(n: int, dtype: torch.dtype = DOUBLE) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=generator, dtype=dtype)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def smooth(dtype: torch.dtype = DOUBLE) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
