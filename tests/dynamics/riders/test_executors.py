"""Other processes and clusters find the same branches."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD

from lightning_nested.dynamics import (
    Branching,
    GeneralizedRidgeRider,
    InProcess,
    Processes,
    Ray,
)
from lightning_nested.games import SmallIPD
from tests.cases import DOUBLE
from tests.dynamics.riders import rides
from tests.dynamics.riders.rides import DESCENT, cubic, starts

NO_RAY = importlib.util.find_spec("ray") is None


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


@pytest.mark.skipif(not NO_RAY, reason="ray is installed")
def test_ray_is_asked_for_only_when_used() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"lightning-nested\[ray\]"):
        list(Ray().map(len, [[1]]))


@pytest.mark.slow
@pytest.mark.skipif(NO_RAY, reason="ray is not installed: pip install 'lightning-nested[ray]'")
@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_a_ray_cluster_finds_the_same() -> None:
    import ray

    # Workers would look for the tests' modules in another package of that name, which torch-fidelity installs.
    ray.cloudpickle.register_pickle_by_value(rides)
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
        ray.cloudpickle.unregister_pickle_by_value(rides)
