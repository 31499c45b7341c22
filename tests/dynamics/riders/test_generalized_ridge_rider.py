"""Rides: solutions, resuming from a folder, divergence, the optimizer's own steps, refusals."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam

from lightning_nested.dynamics import (
    Branching,
    GeneralizedRidgeRider,
    InProcess,
    Processes,
    RideTree,
    RidgeRider,
)
from lightning_nested.games import IteratedPrisonersDilemma, SmallIPD
from lightning_nested.optim import ComplexAdam, ComplexSGD, Extragradient
from tests.cases import DOUBLE
from tests.dynamics.riders.rides import DESCENT, QUICK, cubic, starts


def test_both_solutions_of_the_small_dilemma_from_one_point() -> None:
    game = SmallIPD()
    rider = GeneralizedRidgeRider(
        branching=Branching(horizon=10, ascent_steps=12, ascent_rate=0.3), ride_steps=500
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
    branching = Branching(horizon=4, ascent_steps=2, ascent_rate=0.3)  # the points need not be good ones
    rider = GeneralizedRidgeRider(branching=branching, ride_steps=50)
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
    assert [b.name for b in again.leaves] == [b.name for b in whole.leaves]
    with pytest.raises(ValueError, match="another ride \\(ride_steps: 50 there, 51 here"):
        GeneralizedRidgeRider(branching=branching, ride_steps=51).ride(
            game.losses, points, DESCENT, folder=tmp_path
        )
    with pytest.raises(ValueError, match=r"another ride \(losses: .* there"):
        rider.ride(SmallIPD(discount=0.8).losses, points, DESCENT, folder=tmp_path)
    with pytest.raises(ValueError, match="another ride \\(optimizer: SGD there, ComplexSGD here"):
        rider.ride(game.losses, points, partial(ComplexSGD, lr=4.0), folder=tmp_path)
    (kept / "1-0.json").write_text("{half a fi")
    with pytest.raises(ValueError, match=r"1-0.json: .* Delete it"):
        rider.ride(game.losses, points, DESCENT, folder=tmp_path)


def test_a_chunk_that_was_cut_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Rounding depends on what runs together: the whole chunk runs again, and what was finished is kept."""
    game = IteratedPrisonersDilemma()
    rider = GeneralizedRidgeRider(
        branching=Branching(horizon=3, ascent_steps=0, candidates=2, points=2),
        num_directions=3,
        ride_steps=10,
    )
    points, descent = starts(game, 1), partial(SGD, lr=10.0)
    whole = rider.ride(game.losses, points, descent, folder=tmp_path)
    (tmp_path / "branches" / "0.1-2.json").unlink()
    finished = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "branches").glob("*.json")}
    resumed = rider.ride(game.losses, points, descent, folder=tmp_path)
    assert resumed.branches == whole.branches
    assert (
        finished.items()
        <= {f.name: f.stat().st_mtime_ns for f in (tmp_path / "branches").glob("*.json")}.items()
    )


def test_what_leaves_the_finite_numbers_is_said_and_kept_apart() -> None:
    begin = [(torch.tensor([0.1], dtype=DOUBLE),), (torch.tensor([9.0], dtype=DOUBLE),)]
    rider = GeneralizedRidgeRider(
        branching=Branching(horizon=30, ascent_steps=2), ride_steps=40, distances=(0.1, 5.0)
    )
    tree = rider.ride(cubic, begin, partial(SGD, lr=0.5))
    assert [r.finite for r in tree.roots] == [True, False]
    assert {b.name: b.finite for b in tree.leaves} == {
        "0+0@0": True,
        "0-0@0": True,
        "0+0@1": False,
        "0-0@1": False,
    }
    assert [sorted(s.branches) for s in tree.solutions()] == [["0+0@0", "0-0@0"]]
    with pytest.raises(FloatingPointError, match="lower the learning rate or the horizon"):
        rider.ride(cubic, begin[1:], partial(SGD, lr=0.5))
    with pytest.raises(ValueError, match="not in start 1"):
        rider.ride(cubic, [begin[0], (torch.tensor([math.nan], dtype=DOUBLE),)], partial(SGD, lr=0.5))
    with pytest.raises(ValueError, match=r"same shapes. Got \[\(1,\)\] and, as start 1, \[\(2,\)\]"):
        rider.ride(cubic, [begin[0], (torch.zeros(2, dtype=DOUBLE),)], partial(SGD, lr=0.5))


@pytest.mark.parametrize(
    "make", [partial(Adam, lr=0.05), partial(ComplexAdam, lr=0.05), partial(Extragradient, lr=0.1)]
)
def test_a_ride_is_the_plain_run_of_its_optimizer(make: Any) -> None:
    begin = [(torch.tensor([0.1, 0.0], dtype=DOUBLE),)]
    rider = GeneralizedRidgeRider(
        branching=Branching(horizon=2, ascent_steps=1), ride_steps=30, distances=(0.5,)
    )
    tree = rider.ride(lambda w: ((w[0] ** 2 - 1) ** 2).sum(), begin, make)
    assert len(tree.solutions()) == 1
    for branch in tree.leaves:
        (w,) = branch.tensors(begin[0], "start")
        optimizer = make([w.requires_grad_(True)])

        def closure(w: Tensor = w) -> Tensor:
            w.grad = 4 * w.detach() * (w.detach() ** 2 - 1)
            return w.detach().sum()

        for _ in range(30):
            closure()
            optimizer.step(closure if isinstance(optimizer, Extragradient) else None)
        torch.testing.assert_close(branch.tensors(begin[0])[0], w.detach(), rtol=1e-10, atol=1e-12)


def test_more_directions_or_exponents_than_parameters() -> None:
    game = SmallIPD()
    for options, message in (
        ({"num_directions": 3}, "num_directions must be at most the number of parameters. Got 3 and 2"),
        (
            {"branching": Branching(num_exponents=3)},
            "num_exponents must be at most the number of parameters. Got 3",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            GeneralizedRidgeRider(**options).ride(game.losses, starts(game, 1), DESCENT)


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
        (
            lambda: Branching(points=2),
            "points must be at most candidates, from which they begin. Got 2 and 1",
        ),
        (lambda: Processes(max_workers=0), "max_workers must be at least 1. Got 0"),
        (lambda: InProcess(batch_size=0), "batch_size must be at least 1. Got 0"),
        (lambda: Branching(horizon=0), "horizon must be at least 1. Got 0"),
        (lambda: GeneralizedRidgeRider(distances=()), "distances must be positive"),
        (lambda: RidgeRider(step_size=0.0), "step_size must be positive"),
    ],
)
def test_options_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
