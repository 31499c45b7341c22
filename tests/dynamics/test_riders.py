"""Riders: exponents of the horizon, branching points, trees that resume, and all minima from one saddle."""

from __future__ import annotations

import importlib.util
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
    Branch,
    Branching,
    GeneralizedRidgeRider,
    InProcess,
    Processes,
    Ray,
    RideTree,
    RidgeRider,
    update_map,
)
from lightning_nested.dynamics.riders.branching import FiniteTime, screen
from lightning_nested.games import IteratedPrisonersDilemma, MatchingPennies, SmallIPD
from lightning_nested.optim import ComplexAdam, ComplexSGD, Extragradient
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
    found = FiniteTime(training, points, Branching(horizon=4)).exponents(points)
    assert float(found) == pytest.approx(0.5 * math.log(1 + 1 / 16), abs=1e-12)


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


def test_names_are_in_the_order_of_their_numbers() -> None:
    tree = RideTree()
    for name, parent in (
        ("10", None),
        ("2", None),
        ("2.1", None),
        ("2+0", "2"),
        ("10-0", "10"),
        ("2.1+10", "2.1"),
    ):
        tree.add([Branch(name=name, parent=parent, start=[], end=[], losses=[0.0])])
    assert [b.name for b in tree.roots] == ["2", "2.1", "10"]
    assert [b.name for b in tree.leaves] == ["2+0", "2.1+10", "10-0"]
    assert tree.origin("2.1+10") == "2.1"


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


def cubic(w: tuple[Tensor, ...]) -> Tensor:
    """Descent of rate ½ is w ← (w + w³)/2: to 0 from |w| < 1, beyond it soon out of the finite numbers."""
    return -0.25 * (w[0] ** 4).sum() + 0.5 * (w[0] ** 2).sum()


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


NO_RAY = importlib.util.find_spec("ray") is None


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


@pytest.mark.skipif(not NO_RAY, reason="ray is installed")
def test_ray_is_asked_for_only_when_used() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"lightning-nested\[ray\]"):
        list(Ray().map(len, [[1]]))


@pytest.mark.slow
@pytest.mark.skipif(NO_RAY, reason="ray is not installed: pip install 'lightning-nested[ray]'")
@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_a_ray_cluster_finds_the_same() -> None:
    import ray

    game = SmallIPD()
    options: dict[str, Any] = {"branching": Branching(horizon=4, ascent_steps=1), "ride_steps": 5}
    here = GeneralizedRidgeRider(**options, executor=InProcess(batch_size=1))
    there = GeneralizedRidgeRider(**options, executor=Ray(batch_size=1))
    try:
        tree = there.ride(game.losses, starts(game, 2), DESCENT)
        assert tree.branches == here.ride(game.losses, starts(game, 2), DESCENT).branches
        with pytest.raises(FloatingPointError, match="horizon"):
            GeneralizedRidgeRider(executor=Ray()).ride(
                cubic, [(torch.tensor([9.0], dtype=DOUBLE),)], partial(SGD, lr=0.5)
            )
    finally:
        ray.shutdown()


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
