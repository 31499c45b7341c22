"""Spectra of games measured from tensors, without a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lightning_nested.games import Bilinear, Game, QuadraticGame
from lightning_nested.games.measured_spectrum import MeasuredSpectrum, measure_spectrum
from lightning_nested.optim import (
    ComplexAdam,
    ComplexSGD,
    OptimisticAdam,
)
from lightning_nested.optim.step_dynamics import step_dynamics
from tests.callbacks.running_games import Optimizer


def measured(game: Game, optimizers: Sequence[Optimizer], **options: Any) -> MeasuredSpectrum:
    """Measure a game at standard normal players, each after a step of its optimizer."""
    players = game.initial(torch.Generator().manual_seed(0))
    dynamics = {}
    for name, player, make, loss in zip(game.names, players, optimizers, game.losses(players), strict=True):
        optimizer = make([player])
        (player.grad,) = torch.autograd.grad(loss, player, retain_graph=True)
        optimizer.step()
        dynamics[name] = step_dynamics(optimizer, [player])
    return measure_spectrum(game.losses(players), [(p,) for p in players], dynamics, **options)


def test_few_and_all_eigenvalues_count_their_products() -> None:
    game = QuadraticGame.from_eigenvalues([0.5 + 0.1j * k for k in range(1, 31)])
    optimizers: list[Optimizer] = [lambda p: ComplexSGD(p, lr=0.01)] * 2
    few, every = (measured(game, optimizers, k=k) for k in (4, None))
    torch.testing.assert_close(few.eigenvalues, every.eigenvalues[:4], rtol=1e-9, atol=0)
    assert abs(few.eigenvalues[0]) == pytest.approx(0.01 * abs(0.5 + 3j), rel=1e-9)
    assert few.own["first"][0] == pytest.approx(0.005, rel=1e-9)
    # One for each row of the dense matrices.
    assert every.num_products == 60 + 2 * 30
    assert few.rate == pytest.approx(every.rate, rel=1e-12)
    assert (few.shares, every.shares.shape) == (None, (60, 2))  # type: ignore[union-attr]
    torch.testing.assert_close(every.shares.sum(dim=1), torch.ones(60, dtype=torch.float64))  # type: ignore[union-attr]


def test_the_spectrum_is_averaged_over_processes() -> None:
    optimizers: list[Optimizer] = [lambda p: ComplexSGD(p, lr=0.1)] * 2
    alone, halved = (measured(Bilinear(), optimizers, reduce=r) for r in (None, lambda t: t / 2))
    torch.testing.assert_close(halved.eigenvalues, alone.eigenvalues / 2, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Rprop(p, lr=0.1),
        lambda p: ComplexAdam(p, lr=0.1, debias=True),
        lambda p: OptimisticAdam(p, lr=0.1),
    ],
)
def test_no_rate_is_predicted_for_updates_of_another_form(optimizer: Optimizer) -> None:
    assert measured(Bilinear(), [optimizer] * 2).rate is None
