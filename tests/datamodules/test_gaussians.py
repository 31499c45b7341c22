"""The mixture of Gaussians: its moments, its streams, and going on where it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_nested.datamodules import MixtureOfGaussiansDataModule
from lightning_nested.datamodules.gaussians import GaussianBatches


def test_moments() -> None:
    data = MixtureOfGaussiansDataModule(num_modes=8, std=0.1, batch_size=80_000)
    points, mode = next(iter(data.train_dataloader()))
    assert points.dtype == torch.float32
    counts = torch.bincount(mode, minlength=8)
    assert ((counts - 10_000).abs() < 5 * (80_000 * 7 / 64) ** 0.5).all()  # five standard deviations
    for k in range(8):
        own = points[mode == k] - data.centres[k]
        assert (own.mean(dim=0).abs() < 5 * 0.1 / 100).all()
        assert ((own.std(dim=0) - 0.1).abs() < 5 * 0.1 / (2 * 10_000) ** 0.5).all()


def test_layouts() -> None:
    ring = MixtureOfGaussiansDataModule(num_modes=6, radius=3.0).centres
    torch.testing.assert_close(ring.norm(dim=1), torch.full((6,), 3.0))
    grid = MixtureOfGaussiansDataModule(num_modes=25, radius=2.0, layout="grid").centres
    assert sorted(grid.unique().tolist()) == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert len(grid.unique(dim=0)) == 25


def test_batches_are_new_in_every_pass_and_process_and_repeat_with_the_seed() -> None:
    def points(seed: int = 0, rank: int = 0) -> list[torch.Tensor]:
        loader = GaussianBatches(torch.zeros(1, 2), 1.0, batch_size=3, num_batches=2, seed=seed, rank=rank)
        return [batch[0] for _ in range(2) for batch in loader]

    first = points()
    assert len(first) == 4
    every = torch.stack([*first, *points(seed=1), *points(rank=1)])
    assert len(every.flatten(1).unique(dim=0)) == 12
    assert all(torch.equal(a, b) for a, b in zip(first, points(), strict=True))


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_loader_goes_on_where_it_was(stop: int) -> None:
    def loader() -> GaussianBatches:
        return GaussianBatches(torch.zeros(1, 2), 1.0, batch_size=3, num_batches=3, seed=0)

    def drawn(source: GaussianBatches, passes: int) -> list[torch.Tensor]:
        return [batch[0] for _ in range(passes) for batch in source]

    whole = drawn(loader(), 4)
    stopped = loader()
    seen = 0
    for _ in range(3):
        for _ in stopped:
            seen += 1
            if seen == stop:
                break
        if seen == stop:
            break
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    rest = drawn(resumed, 4)[: 12 - stop]
    assert all(torch.equal(a, b) for a, b in zip(whole[stop:], rest, strict=True))
    first_pass = sum(1 for _ in loader()) if stop % 3 == 0 else 3 - stop % 3
    again = loader()
    again.load_state_dict(stopped.state_dict())
    assert sum(1 for _ in again) == first_pass, "the interrupted pass is completed, not begun anew"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1. Got 0"),
        ({"num_batches": 0}, "num_batches must be at least 1. Got 0"),
        ({"std": 0.0}, "std must be positive. Got 0.0"),
        ({"layout": "line"}, "'ring' or 'grid'. Got 'line'"),
        ({"num_modes": 8, "layout": "grid"}, "square number. Got 8"),
        ({"num_modes": 0}, "Got 0"),
    ],
)
def test_wrong_arguments(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MixtureOfGaussiansDataModule(**options)
