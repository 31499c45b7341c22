"""Small games for the tests of GameModule: a bilinear game, sums of two numbers, and a GAN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.modules import GameModule, GANModule
from tests.trainers import trainer

Optimizer = Callable[[Any], torch.optim.Optimizer]


def sgd(lr: float, **options: Any) -> Optimizer:
    return lambda params: torch.optim.SGD(params, lr=lr, **options)


def adam(lr: float, **options: Any) -> Optimizer:
    return lambda params: torch.optim.Adam(params, lr=lr, betas=(0.5, 0.9), **options)


def steps(n: int) -> DataLoader[Any]:
    """n batches; batch k holds the number k + 1."""
    return DataLoader(TensorDataset(torch.arange(1.0, n + 1, dtype=torch.float64)), batch_size=1)


class Scalar(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.value


class Bilinear(GameModule):
    """min over x, max over y of the batch's number times xy."""

    def __init__(self, **kw: Any) -> None:
        if not {"optimizer", "optimizers"} & set(kw):
            kw["optimizer"] = sgd(0.1)
        super().__init__(**kw)
        self.x, self.y = Scalar(1.0), Scalar(0.5)
        self.calls: list[tuple[str, float]] = []

    def players(self) -> dict[str, nn.Module]:
        return {"x": self.x, "y": self.y}

    def player_loss(self, name: str, batch: Any) -> Tensor:
        self.calls.append((name, float(batch[0])))
        product = batch[0].mean() * (self.x() * self.y()).sum()
        return product if name == "x" else -product

    def values(self) -> tuple[float, float]:
        return self.x.value.item(), self.y.value.item()


def mlp(inputs: int, outputs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


class GAN(GANModule):
    """A small GAN whose latents come with the batch if it has four columns, else from the global stream."""

    def __init__(self, **kw: Any) -> None:
        optimizers = {"generator": adam(0.02), "discriminator": adam(0.03)}
        kw = {"optimizers": optimizers, "steps_per_player": {"discriminator": 4}, **kw}
        super().__init__(mlp(2, 2, 0), mlp(2, 1, 1), latent_dim=2, **kw)

    def player_loss(self, name: str, batch: Any) -> Tensor:
        self.latents = batch[0][:, 2:]
        return super().player_loss(name, (batch[0][:, :2],))

    def sample_latents(self, count: int) -> Tensor:
        return self.latents if self.latents.numel() else super().sample_latents(count)


def points(n: int, width: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(n, width, generator=generator, dtype=torch.float64))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=rtol * 1e-3)


BATCHES = DataLoader(torch.ones(4, dtype=torch.float64), batch_size=1)


class Pair(nn.Module):
    """Two numbers; the player's strategy is their sum."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.a + self.b


class Sums(GameModule):
    """min over x, max over y of the batch's number times (x₁+x₂)(y₁+y₂)."""

    def __init__(self, **kw: Any) -> None:
        super().__init__(**{"optimizer": lambda params: torch.optim.SGD(params, lr=0.1), **kw})
        self.x, self.y = Pair(1.0, 0.0), Pair(0.5, 0.0)

    def players(self) -> dict[str, nn.Module]:
        return {"x": self.x, "y": self.y}

    def player_loss(self, name: str, batch: Any) -> Tensor:
        product = batch.mean() * self.x() * self.y()
        return product if name == "x" else -product

    def values(self) -> list[float]:
        return [p.item() for p in self.parameters()]


def fails(module: GameModule, error: type[Exception], match: str, n: int = 4, **options: Any) -> None:
    before = tensors(module)
    with pytest.raises(error, match=match):
        trainer(**options).fit(module, steps(n))
    same(tensors(module), before)  # nothing is lost
