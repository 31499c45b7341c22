"""NestedModule in two processes equals one on the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_nested.hypergradient import ConjugateGradient
from lightning_nested.modules import GradientStrategy, Implicit, LoopOptions, Unrolled
from tests.modules.nested.problems import Classifier, loader, same, tensors
from tests.trainers import trainer


class Save(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        torch.save(tensors(pl_module), self.folder / f"{trainer.global_rank}.pt")


class Split(Classifier):
    """Each process takes its half of every batch, so that the global batch is the one of a single process."""

    def half(self, batch: Any) -> Any:
        n = self.trainer.world_size
        return [part[self.trainer.global_rank :: n] for part in batch]

    def inner_loss(self, batch: Any) -> Tensor:
        return super().inner_loss(self.half(batch))

    def outer_loss(self, batch: Any) -> Tensor:
        return super().outer_loss(self.half(batch))

    def outer_dataloader(self) -> Any:
        return Whole()


class Whole:
    """Batches that no distributed sampler splits."""

    def __iter__(self) -> Any:
        return iter(loader(2))


@pytest.mark.parametrize(
    "gradient",
    [Implicit(solver=ConjugateGradient(damping=0.1)), Unrolled(num_steps=3)],
    ids=["implicit", "unrolled"],
)
def test_two_processes_are_one(gradient: GradientStrategy, tmp_path: Path) -> None:
    def run(*callbacks: Callback, **options: Any) -> Split:
        module = Split(gradient=gradient, loop=LoopOptions(gradient_clip_val=0.2))
        options = {"max_epochs": 2, "limit_val_batches": 0, "use_distributed_sampler": False, **options}
        trainer(*callbacks, **options).fit(module, loader(1), loader(2))
        return module

    run(Save(tmp_path), devices=2, strategy="ddp_fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    same(first, second)
    same(first, tensors(run()), rtol=1e-10)
