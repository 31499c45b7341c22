"""Small regressions that the tests of HypergradientCallback tune."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from torchmetrics import MeanSquaredError

from lightning_nested.callbacks import HypergradientCallback
from tests.cases import DOUBLE


class Regression(LightningModule):
    """Half the mean squared error of a small network."""

    def __init__(self, net: nn.Module, rate: float = 0.05) -> None:
        super().__init__()
        self.net, self.rate, self.error = net, rate, MeanSquaredError()
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        loss = 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean()
        self.log("train", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        prediction = self.net(batch[0])
        self.error(prediction, batch[1])
        self.log("error", self.error)
        loss = 0.5 * ((prediction - batch[1]) ** 2).mean()
        self.log("val", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)


def data(n: int, seed: int, dtype: torch.dtype = DOUBLE) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=dtype)
    return TensorDataset(
        x, x.sum(1, keepdim=True) + 0.5 * torch.randn(n, 1, generator=generator, dtype=dtype)
    )


def smooth(dtype: torch.dtype = DOUBLE) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


def unit() -> nn.Module:
    """Return one neuron: six numbers, for runs of many products."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 1), nn.Tanh()).double()


def noisy() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1)]
    return nn.Sequential(*layers)


def sgd(rate: float) -> Any:
    return lambda tensors: torch.optim.SGD(tensors, lr=rate)


def values(callback: HypergradientCallback) -> Tensor:
    return torch.cat([v.flatten().double() for v in callback.values().values()])


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class ScalerAlone(MixedPrecision):
    """The gradient scaler of fp16 without its autocast, so that float64 can tell whether the scale cancels."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))

    def forward_context(self) -> AbstractContextManager[None]:
        return nullcontext()


class Checkpointed(nn.Module):
    """Runs its network again in the backward pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.net, x, use_reentrant=False)
        return y
