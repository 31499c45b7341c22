"""Ridges from one saddle lead to all minima."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nested.dynamics import (
    RidgeRider,
)
from tests.cases import DOUBLE


def wells(d: int) -> tuple[Any, Tensor]:
    """2^d minima at the corners of a turned cube, a saddle of d negative curvatures between them."""
    generator = torch.Generator().manual_seed(d)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=DOUBLE))[0]
    weight = torch.linspace(1, 2, d, dtype=DOUBLE)

    def loss(w: tuple[Tensor, ...]) -> Tensor:
        y = turn @ w[0]
        return (weight * (y**2 - 1) ** 2).sum() + 0.05 * y.prod()

    return loss, turn


@pytest.mark.parametrize(
    "d", [2, 3, 4, pytest.param(5, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)]
)
def test_ridges_from_one_saddle_lead_to_all_minima(d: int) -> None:
    loss, turn = wells(d)
    tree = RidgeRider(descent_rate=0.03).ride(
        loss, (torch.zeros(d, dtype=DOUBLE),), behaviour=lambda w: turn @ w[0]
    )
    corners = {tuple(round(x) for x in s.behaviour) for s in tree.solutions()}
    assert len(corners) == len(tree.solutions()) == 2**d
    assert all(abs(abs(x) - 1) < 0.1 for s in tree.solutions() for x in s.behaviour)


def test_a_folder_of_another_loss_is_refused(tmp_path: Path) -> None:
    saddle = (torch.zeros(1, dtype=DOUBLE),)
    RidgeRider().ride(lambda w: ((w[0] ** 2 - 1) ** 2).sum(), saddle, folder=tmp_path)
    with pytest.raises(ValueError, match="curvature"):
        RidgeRider().ride(lambda w: ((w[0] ** 2 - 4) ** 2).sum(), saddle, folder=tmp_path)


def test_a_ridge_that_leaves_where_the_loss_is_defined_ends_there() -> None:
    tree = RidgeRider(max_depth=1).ride(
        lambda w: -(w[0] ** 2) * (1.5 - w[0]).log() * 3, (torch.zeros((), dtype=DOUBLE),)
    )
    assert sorted(b.finite for b in tree.branches.values()) == [False, True, True]
