"""GameModule against hand-written loops, under two processes, resumed, and with wrong input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.modules import GameLoop, GameModule

Optimizer = Callable[[Any], torch.optim.Optimizer]


def sgd(lr: float, **options: Any) -> Optimizer:
    return lambda params: torch.optim.SGD(params, lr=lr, **options)


def trainer(folder: Path | None = None, **options: Any) -> Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "devices": 1, **options}
    return Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **options,
    )


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


# ---- the schedule


def test_alternating_steps_take_fresh_batches_and_see_new_parameters() -> None:
    module = Bilinear(steps_per_player={"x": 3})
    fit = trainer()
    fit.fit(module, steps(8))
    order = ["x", "x", "x", "y", "x", "x", "x", "y"]
    assert module.calls == [(name, k + 1.0) for k, name in enumerate(order)]
    x, y = 1.0, 0.5
    for k, name in enumerate(order):
        if name == "x":
            x -= 0.1 * (k + 1) * y
        else:
            y += 0.1 * (k + 1) * x
    assert module.values() == pytest.approx((x, y), rel=1e-14)
    assert (module.game_updates, fit.global_step, module.gradient_evaluations) == (2, 2, 8)


def test_simultaneous_gradients_are_of_one_point_and_one_batch() -> None:
    module = Bilinear(update="simultaneous")
    fit = trainer()
    fit.fit(module, steps(4))
    assert module.calls == [(name, k) for k in (1.0, 2.0, 3.0, 4.0) for name in "xy"]
    x, y = 1.0, 0.5
    for k in range(1, 5):
        x, y = x - 0.1 * k * y, y + 0.1 * k * x
    assert module.values() == pytest.approx((x, y), rel=1e-14)
    assert (module.game_updates, fit.global_step) == (4, 4)


def test_a_batch_can_be_used_twice() -> None:
    module = Bilinear(steps_per_player={"x": 2}, loop=GameLoop(reuse_batch=True))
    trainer().fit(module, steps(4))
    assert module.calls == [("x", 1.0), ("x", 2.0), ("y", 2.0), ("x", 3.0), ("x", 4.0), ("y", 4.0)]
    assert module.game_updates == 2
