"""Riders: exponents of the horizon, branching points, trees that resume, and all minima from one saddle."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from lightning_nested.dynamics import (
    Branching,
    GeneralizedRidgeRider,
    Processes,
    Ray,
    RideTree,
    RidgeRider,
    update_map,
)
from lightning_nested.dynamics.branching import FiniteTime
from lightning_nested.games import IteratedPrisonersDilemma, MatchingPennies, SmallIPD
from lightning_nested.optim import ComplexSGD
from tests.cases import DOUBLE

QUICK = Branching(horizon=10, ascent_steps=4, ascent_rate=0.3)
DESCENT = partial(SGD, lr=4.0)


def starts(game: Any, count: int) -> list[tuple[Tensor, ...]]:
    return [
        tuple(p.detach() for p in game.initial(torch.Generator().manual_seed(seed))) for seed in range(count)
    ]


def stacked(points: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(p) for p in zip(*points, strict=True))


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


@pytest.mark.parametrize("segment", [3])
def test_checkpoints_change_no_gradient(segment: int) -> None:
    game = SmallIPD()
    batch = tuple(p.requires_grad_(True) for p in stacked(starts(game, 2)))
    training = update_map(DESCENT([p[0].detach() for p in batch]), game.losses)
    grads = [
        torch.autograd.grad(
            FiniteTime(training, batch, Branching(horizon=10, segment=s)).exponents(batch).sum(), batch
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
    found = FiniteTime(training, points, Branching(horizon=4)).exponents(points)
    assert float(found) == pytest.approx(0.5 * math.log(1 + 1 / 16), abs=1e-12)


def test_both_solutions_of_the_small_dilemma_from_one_point() -> None:
    game = SmallIPD()
    rider = GeneralizedRidgeRider(
        branching=Branching(horizon=15, ascent_steps=25, ascent_rate=0.3), ride_steps=500
    )
    points = [(torch.tensor([0.2], dtype=DOUBLE), torch.tensor([-0.4], dtype=DOUBLE))]
    tree = rider.ride(game.losses, points, DESCENT)
    found = [s.losses for s in tree.solutions(tree.below("0"))]
    assert found[0] == pytest.approx([1.0, 1.0], abs=0.02)
    assert found[-1] == pytest.approx([1.9590640] * 2, abs=0.02)
    assert [s.branches for s in tree.solutions()] in ([["0+0"], ["0-0"]], [["0-0"], ["0+0"]])
    root = tree.branches["0"]
    assert max(root.behaviour) >= root.behaviour[0]  # the objective never ends below where it began


def test_a_ride_goes_on_from_its_folder_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    game = SmallIPD()
    rider = GeneralizedRidgeRider(branching=QUICK, ride_steps=50)
    points = starts(game, 2)
    whole = rider.ride(game.losses, points, DESCENT)

    class InterruptedRideError(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what == "ride":
            raise InterruptedRideError

    with pytest.raises(InterruptedRideError):
        rider.ride(game.losses, points, DESCENT, folder=tmp_path, progress=stop)
    kept = tmp_path / "branches"
    assert sorted(f.stem for f in kept.glob("*.json")) == ["0", "1"]
    (kept / "1.part").write_text("{half a fi")  # what an interruption in the middle of writing leaves
    done: list[str] = []
    resumed = rider.ride(
        game.losses, points, DESCENT, folder=tmp_path, progress=lambda what, *_: done.append(what)
    )
    assert set(done) == {"ride"}, "branching points were there"
    assert {n: b.losses for n, b in resumed.branches.items()} == {
        n: b.losses for n, b in whole.branches.items()
    }
    assert resumed.branches["0+0"].path == whole.branches["0+0"].path
    again = RideTree(folder=tmp_path, settings=resumed.settings)
    assert again.branches == resumed.branches
    with pytest.raises(ValueError, match="another ride"):
        GeneralizedRidgeRider(branching=QUICK, ride_steps=51).ride(
            game.losses, points, DESCENT, folder=tmp_path
        )


@pytest.mark.slow
def test_other_processes_find_the_same_and_name_what_cannot_be_sent() -> None:
    game = SmallIPD()
    options: dict[str, Any] = {"branching": Branching(horizon=4, ascent_steps=1), "ride_steps": 5}
    here = GeneralizedRidgeRider(**options).ride(game.losses, starts(game, 2), DESCENT)
    away = GeneralizedRidgeRider(**options, executor=Processes(max_workers=1))
    there = away.ride(game.losses, starts(game, 2), DESCENT)
    for name, branch in here.branches.items():
        assert there.branches[name].losses == pytest.approx(branch.losses, rel=1e-9)
    with pytest.raises(TypeError, match=r"functools\.partial"):
        away.ride(game.losses, starts(game, 2), lambda params: SGD(params, lr=1.0))


def test_ray_is_asked_for_only_when_used() -> None:
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match=r"lightning-nested\[ray\]"):
            list(Ray().map(len, [[1]]))


@pytest.mark.slow
def test_depth_branches_again_from_every_end() -> None:
    game = SmallIPD()
    rider = GeneralizedRidgeRider(branching=QUICK, ride_steps=20, depth=2)
    tree = rider.ride(game.losses, starts(game, 1), DESCENT)
    assert set(tree.branches) == {"0", "0+0", "0-0", "0+0/", "0-0/", "0+0/+0", "0+0/-0", "0-0/+0", "0-0/-0"}
    assert len(tree.leaves) == len(tree.below("0")) == 4
    json.dumps(tree.table())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Branching(objective="mean"), "Got 'mean'"),
        (lambda: Branching(horizon=0), "horizon must be at least 1. Got 0"),
        (lambda: GeneralizedRidgeRider(distances=()), "distances must be positive"),
        (lambda: RidgeRider(step_size=0.0), "step_size and descent_rate must be positive"),
    ],
)
def test_options_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_horizon_beyond_memory_is_refused() -> None:
    game = SmallIPD()
    training = update_map(DESCENT([p.clone() for p in starts(game, 1)[0]]), game.losses)
    with pytest.raises(MemoryError, match="shorten horizon"):
        FiniteTime(training, stacked(starts(game, 1)), Branching(horizon=10**10, segment=1))


# --- one loss


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
