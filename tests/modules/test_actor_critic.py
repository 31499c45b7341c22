"""ActorCritic: losses with a known gradient, on-policy batches, spectra, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torch.utils.data import DataLoader

from lightning_nested.callbacks import GameSpectrumCallback
from lightning_nested.games import Rollout, game_jacobian
from lightning_nested.modules import ActorCritic, GameLoop
from tests.cases import DOUBLE
from tests.trainers import trainer


class Logits(nn.Module):
    """The same logits after every observation."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return self.values.expand(len(x), -1)


class Value(Logits):
    """One number."""


def bandit(taken: Sequence[Any], rewards: list[float], counts: Tensor | None = None) -> Rollout:
    """One step of each environment, which ends the episode."""
    n = len(taken)
    yes = torch.ones(1, n, dtype=torch.bool)
    return Rollout(
        observations=torch.zeros(2, n, 1, dtype=DOUBLE),
        actions=torch.tensor([taken]),
        rewards=torch.tensor([rewards], dtype=DOUBLE),
        terminated=yes,
        ended=yes,
        counts=yes if counts is None else counts,
        returns=torch.tensor(rewards),
    )


def module(critic: float = 0.0, **options: Any) -> ActorCritic:
    sgd = partial(torch.optim.SGD, lr=0.3)
    return ActorCritic(
        Logits(*torch.tensor([0.5, 0.25, 0.25]).log()), Value(critic), optimizer=sgd, **options
    )


# Each action as often as the policy (½, ¼, ¼) takes it: the mean over them is the expectation.
ACTIONS, PAYS = [0, 0, 1, 2], torch.tensor([1.0, 5.0, 3.0], dtype=DOUBLE)
EVERY = bandit(ACTIONS, PAYS[ACTIONS].tolist())


@pytest.mark.parametrize("critic", [0.0, 2.0])
def test_the_policy_gradient_of_a_bandit_is_exact(critic: float) -> None:
    """∂E[r]/∂logit_k = π_k (r_k − E[r]), whatever the critic says; advantages are divided by their deviation."""
    game = module(critic, entropy=0.0)
    pi = torch.tensor([0.5, 0.25, 0.25], dtype=DOUBLE)
    mean = (pi * PAYS).sum()
    deviation = (pi * (PAYS - mean) ** 2).sum().sqrt()
    (gradient,) = torch.autograd.grad(game.player_loss("actor", EVERY), game.actor.parameters())
    torch.testing.assert_close(gradient, -pi * (PAYS - mean) / deviation, rtol=1e-6, atol=1e-7)


def test_entropy_is_taken_off_the_actors_loss() -> None:
    found = [module(entropy=c).player_loss("actor", EVERY) for c in (0.0, 2.0)]
    torch.testing.assert_close(
        found[0] - found[1], torch.tensor(2 * 1.5, dtype=DOUBLE) * torch.tensor(2.0).log()
    )


def test_the_critic_descends_to_the_mean_return() -> None:
    game = module(1.0)
    loss = game.player_loss("critic", EVERY)
    (gradient,) = torch.autograd.grad(loss, game.critic.parameters())
    assert loss.item() == pytest.approx(float(((PAYS[ACTIONS] - 1) ** 2).mean()))
    assert float(gradient) == pytest.approx(2 * (1 - 2.5))


def test_steps_that_do_not_count_change_nothing() -> None:
    counts = torch.tensor([[True, True, True, True, False]])
    longer = bandit([*ACTIONS, 2], [*PAYS[ACTIONS].tolist(), 1e3], counts=counts)
    for name in ("actor", "critic"):
        torch.testing.assert_close(module().player_loss(name, longer), module().player_loss(name, EVERY))


def test_a_fit_learns_the_best_arm_and_says_what_it_returns() -> None:
    class Arms:
        """Ten rollouts of the policy of the moment; their length keeps the Trainer from asking ahead."""

        def __len__(self) -> int:
            return 10

        def __iter__(self) -> Any:
            for _ in range(10):
                actions = game.act(torch.zeros(64, 1))
                yield bandit(actions.tolist(), PAYS[actions].tolist())

    torch.manual_seed(0)
    game = module()
    assert game.mean_return() is None
    fit = trainer(max_epochs=6, log_every_n_steps=1)
    fit.fit(game, Arms())
    assert game.game_updates == 60
    assert game.actor.values.detach().softmax(0)[1] > 0.9
    assert game.mean_return() == pytest.approx(5, abs=0.5)
    assert float(fit.callback_metrics["mean_return"]) == pytest.approx(game.mean_return())


def test_the_jacobian_has_the_critics_influence_on_the_actor_alone() -> None:
    """Block (actor, critic) is ∂²L_actor/∂θ∂V; two steps with a value between, or a constant critic would cancel."""
    torch.manual_seed(0)
    game = ActorCritic(nn.Linear(1, 2).double(), nn.Linear(1, 1).double())
    no = torch.zeros(2, 3, dtype=torch.bool)
    batch = Rollout(
        observations=torch.randn(3, 3, 1, dtype=DOUBLE),
        actions=torch.tensor([[0, 1, 1], [1, 0, 1]]),
        rewards=torch.randn(2, 3, dtype=DOUBLE),
        terminated=no,
        ended=no,
        counts=~no,
        returns=torch.zeros(0),
    )
    players = tuple(tuple(game.players()[name].parameters()) for name in ("actor", "critic"))
    with game.joint_evaluation(["actor", "critic"]):
        losses = game.player_losses(["actor", "critic"], batch)
    jacobian = game_jacobian(tuple(losses.values()), players)
    assert jacobian[:4, 4:].abs().max() > 1e-3
    assert jacobian[4:, :4].abs().max() == 0


@pytest.mark.filterwarnings("ignore:The loss of 'critic' has no graph to the parameters of 'actor'")
def test_a_spectrum_is_measured_and_its_checkpoint_loads_without_pickled_classes(tmp_path: Path) -> None:
    """The callback keeps the batch of its measurements."""
    torch.manual_seed(0)
    spectrum = GameSpectrumCallback(1, k=None)
    fit = trainer(spectrum)
    fit.fit(module(), DataLoader([EVERY], batch_size=None))  # type: ignore[arg-type]
    assert spectrum.history
    fit.save_checkpoint(tmp_path / "game.ckpt")
    assert torch.load(tmp_path / "game.ckpt", weights_only=True)["global_step"] == 1


def rollouts(*found: Any) -> DataLoader[Any]:
    return DataLoader(found, batch_size=None)  # type: ignore[arg-type]


class Gaussian(ActorCritic):
    """Continuous actions, each of two numbers."""

    summed = True

    def policy(self, observations: Tensor) -> Any:
        normal = Normal(self.actor(observations), 1.0)
        return Independent(normal, 1) if self.summed else normal


def test_continuous_actions_are_one_policy_away() -> None:
    game = Gaussian(Logits(0.0, 0.0), Value(0.0), entropy=0.0)
    assert game.act(torch.zeros(4, 1)).shape == (4, 2)
    batch = bandit([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]], [3.0, 1.0, -2.0, -2.0])
    (gradient,) = torch.autograd.grad(game.player_loss("actor", batch), game.actor.parameters())
    scale = 4.5**0.5  # deviation of the rewards, whose mean is 0
    torch.testing.assert_close(gradient, -torch.tensor([3.0, 2.0], dtype=DOUBLE) / 4 / scale)
    game.summed = False
    with pytest.raises(
        MisconfigurationException, match=r"log_prob of the policy .* each of 4. Got shape \(4, 2\)"
    ):
        game.player_loss("actor", batch)


def test_without_entropy_a_policy_needs_not_know_its_own() -> None:
    class Squashed(Gaussian):
        def policy(self, observations: Tensor) -> Any:
            normal = Normal(self.actor(observations), 1.0)
            return Independent(TransformedDistribution(normal, [TanhTransform()]), 1)

    batch = bandit([[0.5, 0.0], [0.0, 0.2]], [3.0, 1.0])
    assert Squashed(Logits(0.0, 0.0), Value(0.0), entropy=0.0).player_loss("actor", batch).isfinite()
    with pytest.raises(NotImplementedError):
        Squashed(Logits(0.0, 0.0), Value(0.0)).player_loss("actor", batch)


@pytest.mark.parametrize(("batches", "updates"), [(1, 3), (2, 1)])
def test_both_step_on_each_rollout_but_where_losses_are_accumulated(batches: int, updates: int) -> None:
    game = module(loop=GameLoop(gradient_clip_val=1.0, accumulate_grad_batches=batches))
    trainer().fit(game, rollouts(EVERY, EVERY, EVERY))
    assert game.loop.gradient_clip_val == 1
    assert (game.game_updates, game.loop.reuse_batch) == (updates, batches == 1)


def test_a_run_that_resumes_knows_the_returns_and_another_one_does_not(tmp_path: Path) -> None:
    game, fit = module(), trainer()
    fit.fit(game, rollouts(EVERY))
    fit.save_checkpoint(tmp_path / "game.ckpt")
    assert game.mean_return() == 2.5
    (resumed, again), none = (module(), trainer(max_epochs=2)), {**EVERY, "returns": torch.zeros(0)}
    again.fit(resumed, rollouts(none), ckpt_path=tmp_path / "game.ckpt")
    assert (resumed.game_updates, resumed.mean_return()) == (2, 2.5)
    again.save_checkpoint(tmp_path / "resumed.ckpt")
    assert torch.load(tmp_path / "resumed.ckpt", weights_only=True)["game"]["returns"] == [1, 1, 5, 3]
    trainer().fit(resumed, rollouts(none))
    assert resumed.mean_return() is None


def test_a_checkpoint_without_returns_loads(tmp_path: Path) -> None:
    fit = trainer()
    fit.fit(module(), rollouts(EVERY))
    fit.save_checkpoint(tmp_path / "game.ckpt")
    old = torch.load(tmp_path / "game.ckpt", weights_only=True)
    del old["game"]["returns"]
    torch.save(old, tmp_path / "old.ckpt")
    game = module()
    trainer(max_epochs=2).fit(game, rollouts(EVERY), ckpt_path=tmp_path / "old.ckpt")
    assert (game.game_updates, game.mean_return()) == (2, 2.5)


class Means(Callback):
    """Keeps what a callback may monitor after each batch."""

    def __init__(self, folder: Path | None = None) -> None:
        self.found: list[float] = []
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.found.append(float(trainer.callback_metrics.get("mean_return", -1)))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.folder is not None:
            torch.save(self.found, self.folder / f"{trainer.global_rank}.pt")


def test_the_mean_return_is_monitored_at_every_update() -> None:
    means = Means()
    trainer(means, log_every_n_steps=50).fit(
        module(),
        rollouts({**EVERY, "returns": torch.zeros(0)}, EVERY, {**EVERY, "returns": torch.full((4,), 4.5)}),
    )
    assert means.found == [-1, 2.5, 3.5]


class Shared:
    """On process 0 the first rollout ends an episode, on process 1 the second ends two."""

    def __init__(self, game: ActorCritic) -> None:
        self.game = game

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        returns = [[1.0], []] if self.game.global_rank == 0 else [[], [2.0, 6.0]]
        return iter([{**EVERY, "returns": torch.tensor(r)} for r in returns])


def test_all_processes_monitor_the_returns_of_all(tmp_path: Path) -> None:
    """A checkpoint's monitor waits for the others: it would hang where one has no value."""
    game = module()
    saved = ModelCheckpoint(tmp_path, monitor="mean_return", mode="max", every_n_train_steps=1)
    fit = trainer(
        Means(tmp_path), saved, folder=tmp_path, enable_checkpointing=True, devices=2, strategy="ddp_fork"
    )
    fit.fit(game, Shared(game))
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)] == [[1, 3], [1, 3]]


def test_refusals() -> None:
    with pytest.raises(MisconfigurationException, match="critic must have one number"):
        ActorCritic(Logits(0.0, 0.0), Logits(0.0, 0.0)).player_loss("critic", EVERY)
    with pytest.raises(MisconfigurationException, match=r"must be a Rollout\. Got list"):
        trainer(max_steps=1).fit(module(), DataLoader([[torch.zeros(2, 1)]], batch_size=None))  # type: ignore[arg-type]
    for options in ({"discount": 1.1}, {"trace": -0.1}, {"entropy": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            module(**options)
