"""Derivatives of the zoo's games by autograd, independent of the package, for its tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_nested.games import (
    Game,
)

DOUBLE = torch.float64


def logit(p: float) -> Tensor:
    return torch.tensor([math.log(p / (1 - p))], dtype=DOUBLE)


def jacobian(game: Game, *players: Tensor) -> Tensor:
    """Jacobian of the joint gradient from autograd's Hessian of each loss, row block by row block."""
    rows = []
    for i in range(len(players)):
        hessian = torch.autograd.functional.hessian(lambda *p, i=i: game.losses(p)[i], players)
        rows.append(torch.cat(hessian[i], dim=1))
    return torch.cat(rows)


def by_imaginary(values: Tensor) -> list[complex]:
    return sorted(values.to(torch.complex128).tolist(), key=lambda z: (round(z.imag, 9), z.real))
