"""Two processes: different points, equal hyperparameters, and the same run as one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_nested.hypernetworks import DenseResponse
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.modules import STN, DeltaSTN, ResponseLoop, ResponseOptions, Simplified
from tests.modules.hypernetwork.problems import (
    X_VAL,
    Y_VAL,
    Classifier,
    Ridge,
    X,
    Y,
    loader,
    same,
    sgd,
    steps,
    tensors,
)
from tests.trainers import trainer


class Save(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.noise: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        center = pl_module.vector.flat().detach()
        self.noise.append(pl_module._steps.noise(center, None, pl_module.inner_steps, 2))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        torch.save([self.noise[0], tensors(pl_module)], self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("loop", [DeltaSTN(train_steps=2), STN()], ids=["Delta-STN", "STN"])
def test_two_processes_try_other_points_and_agree(loop: ResponseLoop, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 2))
    module = Classifier(net=net, loop=loop)
    before = tensors(module)
    trainer(Save(tmp_path), limit_val_batches=0, max_epochs=2, devices=2, strategy="ddp_fork").fit(
        module, loader(1), loader(2)
    )
    (noise, first), (other, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert not torch.equal(noise, other)
    same(first, second)
    assert all(bool((a != b).any()) for a, b in zip(before[-2:], first[-2:], strict=True))


class Halves(Ridge):
    """Each process takes its half of the examples: two processes must be one, without noise."""

    def half(self, t: Tensor) -> Tensor:
        return t[self.trainer.global_rank :: self.trainer.world_size]

    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        return 0.5 * (self.network(self.half(X)).squeeze(-1) - self.half(Y)).square().mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return 0.5 * (self.network(self.half(X_VAL)).squeeze(-1) - self.half(Y_VAL)).square().mean()


def test_two_processes_are_one(tmp_path: Path) -> None:
    def run(*callbacks: Callback, **options: Any) -> Halves:
        torch.manual_seed(0)
        net = nn.Linear(4, 1).double()
        module = Halves(
            DenseResponse(net, 1, hidden=(3,)), WeightDecay(per="model", init=0.5), loop=Simplified(),
            weights_optimizer=sgd(0.1), response_optimizer=sgd(0.1), outer_optimizer=sgd(1.0),
            options=ResponseOptions(gradient_clip_val=0.5),
        )  # fmt: skip
        trainer(*callbacks, limit_val_batches=0, use_distributed_sampler=False, **options).fit(
            module, steps(6), steps(1)
        )
        return module

    run(Save(tmp_path), devices=2, strategy="ddp_fork")
    same(torch.load(tmp_path / "1.pt")[1], tensors(run()), rtol=1e-12)
