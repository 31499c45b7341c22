"""Hyperparameters that are built, and images to try them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DOUBLE = {"w": torch.zeros(1, dtype=torch.float64)}


def built(hyperparameter: Any) -> Any:
    hyperparameter.build(DOUBLE)
    return hyperparameter


def images(size: int = 6, channels: int = 3) -> Tensor:
    return torch.rand(size, channels, 8, 8, dtype=torch.float64)
