"""Finite-time exponents, their gradients, and the branching points that they lead to."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from lightning_nested.dynamics import (
    Branching,
    GeneralizedRidgeRider,
    maps,
    update_map,
)
from lightning_nested.dynamics.riders.branching import FiniteTime, screen
from lightning_nested.games import IteratedPrisonersDilemma, MatchingPennies, SmallIPD
from lightning_nested.optim import ComplexSGD
from tests.cases import DOUBLE
from tests.dynamics.riders.rides import DESCENT, stacked, starts


@pytest.mark.parametrize("optimizer", [partial(SGD, lr=1.0), partial(ComplexSGD, lr=1.0)])
def test_finite_time_exponents_and_their_gradient(optimizer: Any) -> None:
    game = IteratedPrisonersDilemma()
    points = starts(game, 2)
    training = update_map(optimizer([p.clone() for p in points[0]]), game.losses)
    finite = FiniteTime(training, stacked(points), Branching(horizon=5, num_exponents=2))

    def exponents(flat: Tensor) -> Tensor:
        """By dense derivatives of the unrolled run."""

        def end(z: Tensor) -> Tensor:
            state = training.start((z[:5], z[5:]))
            for _ in range(5):
                state = training.step(state)
            return torch.cat([s.flatten() for s in training.coordinates(state)])

        return torch.linalg.svdvals(torch.func.jacrev(end)(flat))[:2].log() / 5

    batch = tuple(p.requires_grad_(True) for p in stacked(points))
    found = finite.exponents(batch)
    for i, point in enumerate(points):
        torch.testing.assert_close(found[i], exponents(torch.cat(point)), rtol=1e-9, atol=1e-10)
    gradient = torch.autograd.grad(found[:, 0].sum(), batch)
    flat, h = torch.cat(points[1]), 1e-6
    for j in (0, 7):
        e = torch.eye(10, dtype=DOUBLE)[j]
        difference = (exponents(flat + h * e)[0] - exponents(flat - h * e)[0]) / (2 * h)
        torch.testing.assert_close(torch.cat([g[1] for g in gradient])[j], difference, rtol=1e-5, atol=1e-8)


def test_gradient_of_a_map_that_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    game = SmallIPD()
    batch = tuple(p.requires_grad_(True) for p in stacked(starts(game, 2)))
    training = update_map(DESCENT([p[0].detach() for p in batch]), game.losses)

    def refuse(function: Any) -> Any:
        raise RuntimeError("cannot be recorded")

    monkeypatch.setattr(maps, "make_fx", refuse)
    finite, h = FiniteTime(training, batch, Branching(horizon=2)), 1e-6
    (found,) = torch.autograd.grad(finite.exponents(batch).sum(), batch[:1])
    with torch.no_grad():
        ahead, behind = (finite.exponents((batch[0] + move, batch[1])) for move in (h, -h))
    torch.testing.assert_close(found, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("segment", [3])
def test_checkpoints_change_no_gradient(segment: int) -> None:
    game = SmallIPD()
    batch = tuple(p.requires_grad_(True) for p in stacked(starts(game, 2)))
    training = update_map(DESCENT([p[0].detach() for p in batch]), game.losses)
    grads = [
        torch.autograd.grad(
            FiniteTime(training, batch, Branching(horizon=7, segment=s)).exponents(batch).sum(), batch
        )
        for s in (None, segment)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("objective", "value"), [("max", 0.3), ("min", -0.2), ("sum", 0.2), ("positive", 0.4)]
)
def test_objectives(objective: str, value: float) -> None:
    branching = Branching(objective=objective, num_exponents=3)
    exponents = torch.tensor([0.3, 0.1, -0.2, -0.9], dtype=DOUBLE)
    assert float(branching.value(exponents)) == pytest.approx(value)


def test_matching_pennies_turns_at_its_known_rate() -> None:
    points = tuple(torch.zeros(1, 1, dtype=DOUBLE) for _ in range(2))
    training = update_map(SGD([p[0] for p in points], lr=1.0), MatchingPennies().losses)
    found = FiniteTime(training, points, Branching(horizon=2)).exponents(points)
    assert float(found) == pytest.approx(0.5 * math.log(1 + 1 / 16), abs=1e-12)


@pytest.mark.slow
def test_several_branching_points_of_a_start_begin_from_the_best_candidates() -> None:
    game = SmallIPD()
    branching = Branching(horizon=6, ascent_steps=3, candidates=12, points=3)
    begin = starts(game, 2)
    training = update_map(DESCENT([p.clone() for p in begin[0]]), game.losses)
    best = screen(training, stacked(begin), branching)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(12, 1, generator=generator, dtype=DOUBLE) for _ in range(2)]
    for i, start in enumerate(begin):
        cloud = tuple(p + d.index_fill(0, torch.tensor([0]), 0.0) for p, d in zip(start, draws, strict=True))
        value = FiniteTime(training, cloud, branching).exponents(cloud)[:, 0]
        for k, at in enumerate(value.argsort(descending=True)[:3].tolist()):
            assert [float(p[3 * i + k]) for p in best] == [float(p[at]) for p in cloud]
    tree = GeneralizedRidgeRider(branching=branching, ride_steps=3).ride(game.losses, begin, DESCENT)
    assert [r.name for r in tree.roots] == ["0", "0.1", "0.2", "1", "1.1", "1.2"]
    exponents = [r.exponents[0] for r in tree.roots]
    assert exponents[:3] == sorted(exponents[:3], reverse=True)
    assert [b.parent for b in tree.leaves] == [r.name for r in tree.roots for _ in range(2)]
    assert {b.name for b in tree.below("0.1")} == {"0.1+0", "0.1-0"}


def test_a_horizon_beyond_memory_is_refused() -> None:
    game = SmallIPD()
    training = update_map(DESCENT([p.clone() for p in starts(game, 1)[0]]), game.losses)
    with pytest.raises(MemoryError, match="shorten horizon"):
        FiniteTime(training, stacked(starts(game, 1)), Branching(horizon=10**10, segment=1))
