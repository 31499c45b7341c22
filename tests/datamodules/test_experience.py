"""ExperienceDataModule: what is played, by which policy, and where episodes end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from lightning_nested.datamodules import ExperienceDataModule
from lightning_nested.datamodules.experience import Rollouts
from lightning_nested.games import Rollout, generalized_advantages
from lightning_nested.modules import ActorCritic
from tests.trainers import trainer

gymnasium = pytest.importorskip("gymnasium")

LIMIT, CLIFF = 4, 3


class Corridor(gymnasium.Env):  # type: ignore[misc]
    """Steps of the length of the action, with as much reward; final from ``CLIFF`` on, at its time limit after 4."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place = 0.0
        return np.float32([self.place]), {}

    def step(self, action: Any) -> Any:
        self.place += float(action[0])
        return np.float32([self.place]), float(action[0]), self.place >= CLIFF, False, {}


@pytest.fixture(autouse=True)
def _corridor() -> Iterator[None]:
    gymnasium.register("Corridor-v0", entry_point=Corridor, max_episode_steps=LIMIT)
    yield
    del gymnasium.registry["Corridor-v0"]


class Walker(nn.Module):
    """A module that acts: always the same step for each copy."""

    device = torch.device("cpu")

    def __init__(self, *sizes: float) -> None:
        super().__init__()
        self.sizes = torch.tensor(sizes)[:, None]

    def act(self, observations: Tensor) -> Tensor:
        return self.sizes


def played(walker: Walker, *, steps: int, batches: int = 1, **options: Any) -> list[Rollout]:
    made = gymnasium.make_vec("Corridor-v0", num_envs=len(walker.sizes), **options)
    loader = Rollouts(made, walker, num_steps=steps, num_batches=batches, seed=0)
    assert len(loader) == batches
    return list(loader)


def test_a_final_state_a_time_limit_and_the_step_of_the_reset() -> None:
    (found,) = played(Walker(1.0, 0.5), steps=6)
    # The first copy falls in its third step; the second is stopped after its fourth.
    assert found["observations"][:, :, 0].T.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 0.5, 1, 1.5, 2, 0, 0.5]]
    assert found["terminated"].T.tolist() == [[t == 2 for t in range(6)], [False] * 6]
    assert found["ended"].T.tolist() == [[t == 2 for t in range(6)], [t == 3 for t in range(6)]]
    assert found["counts"].T.tolist() == [[t != 3 for t in range(6)], [t != 4 for t in range(6)]]
    assert found["rewards"].T.tolist() == [[1, 1, 1, 0, 1, 1], [0.5, 0.5, 0.5, 0.5, 0, 0.5]]
    assert found["returns"].tolist() == [3, 2]


def test_the_last_reward_is_continued_at_a_time_limit_alone() -> None:
    (found,) = played(Walker(1.0, 0.5), steps=4)
    values = torch.full((5, 2), 10.0)
    advantages = generalized_advantages(
        found["rewards"], values, found["terminated"], found["ended"], discount=0.9, trace=0.5
    )
    assert advantages[2, 0] == 1 - 10
    assert advantages[3, 1] == 0.5 + 0.9 * 10 - 10


def test_episodes_go_on_from_one_batch_to_the_next() -> None:
    (whole,) = played(Walker(1.0, 0.25), steps=6)
    parts = played(Walker(1.0, 0.25), steps=2, batches=3)
    for name, all_steps in whole.items():
        if name != "observations":
            joined = torch.cat([part[name] for part in parts])  # type: ignore[literal-required]
            torch.testing.assert_close(joined, all_steps)
    torch.testing.assert_close(torch.cat([p["observations"][:-1] for p in parts]), whole["observations"][:-1])


def test_a_batch_keeps_what_it_has_seen_in_numbers_that_networks_take() -> None:
    """An environment may hand out one array, which it changes, of any precision."""

    class Reused(gymnasium.vector.VectorEnv):  # type: ignore[misc]
        metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012
        num_envs = 1
        single_observation_space = action_space = single_action_space = Corridor.observation_space

        def reset(self, **_: Any) -> Any:
            self.seen, self.flags = np.zeros((1, 1)), np.zeros(1, dtype=bool)
            return self.seen, {}

        def step(self, actions: Any) -> Any:
            self.seen += 1
            return self.seen, self.seen[0], self.flags, self.flags, {}

    found = Rollouts(Reused(), Walker(1.0), num_steps=2, num_batches=1, seed=0).play()
    assert found["observations"].flatten().tolist() == [0, 1, 2]
    assert found["rewards"].flatten().tolist() == [1, 2]
    assert found["observations"].dtype == found["rewards"].dtype == torch.float32


def test_actions_out_of_bounds_are_kept_for_the_loss_and_clipped_for_the_environment() -> None:
    (found,) = played(Walker(7.0), steps=1)
    assert found["actions"].item() == 7
    assert found["rewards"].item() == 1


class Recorder(ActorCritic):
    """Keeps the weights with which it acted and those with which the actor stepped."""

    acted: list[Tensor]
    stepped: list[Tensor]

    def act(self, observations: Tensor) -> Tensor:
        self.acted.append(self.actor.weight.detach().clone())
        return super().act(observations)

    def player_loss(self, name: str, batch: Any) -> Tensor:
        if name == "actor":
            self.stepped.append(self.actor.weight.detach().clone())
        return super().player_loss(name, batch)


def test_every_batch_is_of_the_policy_that_steps_on_it() -> None:
    torch.manual_seed(0)
    game = Recorder(nn.Linear(4, 2), nn.Linear(4, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    game.acted, game.stepped = [], []
    data = ExperienceDataModule(num_environments=2, num_steps=3, num_batches=2)
    trainer(max_epochs=2, num_sanity_val_steps=0).fit(game, datamodule=data)
    assert game.game_updates == len(game.stepped) == 4
    assert len({tuple(w.flatten().tolist()) for w in game.stepped}) == 4
    for k, weight in enumerate(game.stepped):
        assert all(torch.equal(weight, w) for w in game.acted[3 * k : 3 * k + 3])


def test_the_same_seeds_play_the_same() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(0)
        game = ActorCritic(nn.Linear(4, 2), nn.Linear(4, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        data = ExperienceDataModule(num_environments=2, num_steps=3, num_batches=2, seed=seed)
        trainer().fit(game, datamodule=data)
        return game.actor.weight.detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


class Echo(gymnasium.Env):  # type: ignore[misc]
    """Pays the sum of the numbers of an action, after two pixels."""

    observation_space = gymnasium.spaces.Box(0, 255, (2,), np.uint8)

    def __init__(self, actions: Any) -> None:
        self.action_space = actions

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.uint8([7, 255]), {}

    def step(self, action: Any) -> Any:
        return np.uint8([7, 255]), float(np.sum(action)), False, False, {}


class Given(nn.Module):
    """A module that acts: these actions, whatever it sees."""

    device = torch.device("cpu")

    def __init__(self, actions: Any) -> None:
        super().__init__()
        self.actions = torch.as_tensor(actions)

    def act(self, observations: Tensor) -> Tensor:
        assert observations.dtype == torch.float32
        return self.actions


def echoed(space: Any, actions: Any) -> Rollout:
    made = gymnasium.vector.SyncVectorEnv([lambda: Echo(space)] * 2)
    (found,) = Rollouts(made, Given(actions), num_steps=1, num_batches=1, seed=0)
    return found


spaces = gymnasium.spaces
STEPS = spaces.Box(-2, 2, (1,), np.float32)


@pytest.mark.parametrize(
    ("space", "actions", "sums"),
    [
        (STEPS, [[1.0], [-7.0]], [1, -2]),
        (STEPS, torch.tensor([[1.0], [0.5]], dtype=torch.bfloat16), [1, 0.5]),
        (spaces.Discrete(2, start=1), [0, 1], [1, 2]),
        (spaces.MultiDiscrete([2, 3], start=[1, 5]), [[0, 2], [1, 0]], [8, 7]),
        # samples of Bernoulli
        (spaces.MultiBinary(2), [[1.0, 1.0], [0.0, 1.0]], [2, 1]),
    ],
)
def test_each_copy_plays_its_own_action(space: Any, actions: Any, sums: list[float]) -> None:
    found = echoed(space, actions)
    assert found["rewards"][0].tolist() == sums
    torch.testing.assert_close(found["actions"][0], torch.as_tensor(actions))


@pytest.mark.parametrize(
    ("space", "actions", "message"),
    [
        (STEPS, [1.0, 0.5], r"of shape \(2, 1\) for Box.* Got shape \(2,\)"),
        (spaces.Discrete(2), [[0], [1]], r"of shape \(2,\) for Discrete.* Got shape \(2, 1\)"),
        (STEPS, [[1], [0]], "must be floats for Box.* Got torch.int64"),
        (spaces.Discrete(2), [0.5, 1.0], "must be whole numbers for Discrete.* Got torch.float32"),
        (spaces.Discrete(2), [0, 2], r"numbered from 0 on.* Got \[0, 2\]"),
        (spaces.Discrete(2, start=1), [0, -1], r"numbered from 0 on.* Got \[0, -1\]"),
    ],
)
def test_actions_of_another_space_are_refused(space: Any, actions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        echoed(space, actions)


class Normalized(ActorCritic):
    """Continuous actions, of a network with batch norm."""

    def policy(self, observations: Tensor) -> Any:
        assert observations.dtype == self.dtype
        return Independent(Normal(self.actor(observations), 1.0), 1)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_the_policy_plays_in_evaluation_mode_and_in_the_trainers_precision(precision: Any) -> None:
    actor = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    game = Normalized(actor, nn.Linear(1, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    data = ExperienceDataModule("Corridor-v0", num_environments=2, num_steps=3, num_batches=2)
    trainer(precision=precision).fit(game, datamodule=data)
    assert actor[0].num_batches_tracked == game.game_updates == 2
    assert all(part.training for part in game.modules())


class Starts(Callback):
    """Keeps the first observation of each batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch["observations"][0, 0, 0].item())


def test_a_loader_in_the_middle_of_a_run_begins_at_other_starts(tmp_path: Path) -> None:
    def run(starts: Starts, path: Path | None = None, **options: Any) -> Any:
        game = ActorCritic(nn.Linear(4, 2), nn.Linear(4, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        data = ExperienceDataModule(num_environments=2, num_steps=2, num_batches=1)
        fit = trainer(starts, **options)
        fit.fit(game, datamodule=data, ckpt_path=path)
        return fit

    reloaded, first, resumed = Starts(), Starts(), Starts()
    run(reloaded, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert len(set(reloaded.seen)) == 3
    run(first).save_checkpoint(tmp_path / "first.ckpt")
    run(resumed, tmp_path / "first.ckpt", max_epochs=2)
    # The first loader of a run is of the seed alone.
    assert first.seen == reloaded.seen[:1]
    assert resumed.seen == reloaded.seen[1:2]


@pytest.mark.parametrize(
    ("environment", "actor", "critic", "message"),
    [
        (
            "Acrobot-v1",
            (4, 2),
            (4, 1),
            r"must act on observations .*in batches of shape \(2, 6\). Got RuntimeError",
        ),
        ("Acrobot-v1", (6, 3), (4, 1), r"critic must take observations of shape \(batch, 6\)"),
        ("CartPole-v1", (4, 3), (4, 1), r"Discrete\(2\).* Got a policy over 3 actions"),
        ("CartPole-v1", (4, 1), (4, 1), r"Discrete\(2\).* Got a policy over 1 actions"),
        ("FrozenLake-v1", (16, 4), (16, 1), r"Discrete\(16\).* need an embedding"),
        ("Corridor-v0", (1, 2), (1, 1), r"Box.* Got a policy over 2 actions"),
    ],
)
def test_networks_of_other_sizes_than_the_environment_are_refused(
    environment: str, actor: tuple[int, int], critic: tuple[int, int], message: str
) -> None:
    game = ActorCritic(nn.Linear(*actor), nn.Linear(*critic), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    data = ExperienceDataModule(environment, num_environments=2, num_steps=3, num_batches=1)
    with pytest.raises(MisconfigurationException, match=message):
        trainer(num_sanity_val_steps=0).fit(game, datamodule=data)


def test_refusals() -> None:
    with pytest.raises(MisconfigurationException, match="Got no Trainer"):
        ExperienceDataModule().train_dataloader()
    with pytest.raises(ValueError, match=r"NEXT_STEP\).\s*Got autoreset_mode=AutoresetMode.SAME_STEP"):
        played(
            Walker(1.0), steps=1, vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
        )
    gymnasium.register("Pair-v0", entry_point=Pair)
    with pytest.raises(ValueError, match="arrays or numbers"):
        Rollouts(gymnasium.make_vec("Pair-v0", num_envs=1), Walker(1.0), num_steps=1, num_batches=1, seed=0)
    del gymnasium.registry["Pair-v0"]
    for options in ({"num_environments": 0}, {"num_steps": 1}, {"num_batches": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ExperienceDataModule(**options)  # type: ignore[arg-type]


class Pair(Corridor):
    """Observations that are no array."""

    observation_space = gymnasium.spaces.Tuple([Corridor.observation_space] * 2)
