"""Scores of language models on whole data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def mean_loss(module: Any, rows: Tensor) -> float:
    """Return the mean loss of the tokens of rows (rows, length + 1)."""
    module.eval()
    losses = [float(module.outer_loss((part[:, :-1], part[:, 1:]))) * len(part) for part in rows.split(128)]
    module.train()
    return sum(losses) / len(rows)
