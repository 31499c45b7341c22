"""Starts, optimizers and a loss that the tests of riders share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from lightning_nested.dynamics import (
    Branching,
)

QUICK = Branching(horizon=10, ascent_steps=4, ascent_rate=0.3)


DESCENT = partial(SGD, lr=4.0)


def starts(game: Any, count: int) -> list[tuple[Tensor, ...]]:
    return [
        tuple(p.detach() for p in game.initial(torch.Generator().manual_seed(seed))) for seed in range(count)
    ]


def stacked(points: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(p) for p in zip(*points, strict=True))


def cubic(w: tuple[Tensor, ...]) -> Tensor:
    """Descent of rate ½ is w ← (w + w³)/2: to 0 from |w| < 1, beyond it soon out of the finite numbers."""
    return -0.25 * (w[0] ** 4).sum() + 0.5 * (w[0] ** 2).sum()
