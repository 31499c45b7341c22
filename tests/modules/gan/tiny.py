"""A tiny BigGAN, its data and its Trainer, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lightning_nested.datamodules import SyntheticImagesDataModule
from lightning_nested.modules import BigGAN, BigGANNetworks
from tests import trainers

TINY = BigGANNetworks(width=2, latent_dim=8)


def data(size: int = 40, batch_size: int = 4, **options: Any) -> SyntheticImagesDataModule:
    return SyntheticImagesDataModule(train_size=size, val_size=10, batch_size=batch_size, **options)


def trainer(
    callbacks: Sequence[Callback] = (), default_root_dir: Path | None = None, **options: Any
) -> Trainer:
    """Return a silent Trainer for as many epochs as its steps need, without validation."""
    defaults = {"limit_val_batches": 0, "max_epochs": None, "num_sanity_val_steps": 2}
    return trainers.trainer(*callbacks, folder=default_root_dir, **{**defaults, **options})


def module(**options: Any) -> BigGAN:
    torch.manual_seed(1)
    return BigGAN(options.pop("networks", TINY), **options)


def tensors(of: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in of.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
