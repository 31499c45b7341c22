"""Program of test_ray.py: a callback in one process and on two workers of Ray Train; imports nothing of the tests."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested import ConjugateGradient, Current, HypergradientCallback, WeightDecay


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.5 * (self.net(batch[0]) - batch[1]).square().mean()

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def batches(count: int, size: int, seed: int, rank: int, workers: int) -> Any:
    """Loader of every ``workers``-th example: together the workers have the batches of one process."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=draw, dtype=torch.float64)
    y = x.sum(1, keepdim=True) + 0.5 * torch.randn(count, 1, generator=draw, dtype=torch.float64)
    return DataLoader(TensorDataset(x[rank::workers], y[rank::workers]), size // workers)


def train(folder: Path, workers: int) -> None:
    """Fit, and save the tuned values and the weights."""
    rank, options = 0, dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    callback = HypergradientCallback(
        WeightDecay("parameter", init=1e-2, include=("*",)),
        solver=ConjugateGradient(max_iterations=8, damping=1.0),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        at=Current(),
        every_n_steps=1,
        warmup_steps=0,
    )
    fixed: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "num_sanity_val_steps": 0}
    if workers > 1:
        from ray.train import get_context
        from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

        rank = get_context().get_world_rank()
        fixed |= {"strategy": RayDDPStrategy(), "plugins": [RayLightningEnvironment()], "devices": "auto"}
    trainer = Trainer(callbacks=[callback], use_distributed_sampler=False, **fixed, **options)
    if workers > 1:
        from ray.train.lightning import prepare_trainer

        trainer = prepare_trainer(trainer)
    module = Regression()
    trainer.fit(module, batches(32, 8, 1, rank, workers), batches(16, 16, 2, rank, workers))
    values = torch.cat([value.flatten() for value in callback.values().values()])
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.save((values, weights), folder / f"{workers}_{rank}.pt")


if __name__ == "__main__":
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    place = Path(sys.argv[1])
    train(place, 1)
    TorchTrainer(
        lambda: train(place, 2),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="callback", storage_path=str(place / "ray")),
    ).fit()
