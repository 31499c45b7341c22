"""Updates of two gradients: extrapolated points, latents, buffers and metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_nested.modules import GameLoop, GANModule
from lightning_nested.optim import Extragradient
from tests.modules.game.games import BATCHES, Bilinear, Optimizer, Sums, fails, mlp, points, sgd, steps
from tests.trainers import trainer


class Normed(GANModule):
    """Batch norm in the generator, latents from the global stream."""

    def __init__(self, optimizer: Optimizer, **kw: Any) -> None:
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
        super().__init__(generator, mlp(2, 1, 1), latent_dim=2, optimizer=optimizer, **kw)
        self.draws: list[float] = []

    def sample_latents(self, count: int) -> Tensor:
        latents = super().sample_latents(count)
        self.draws.append(float(latents.sum()))
        return latents


@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_extragradient_looks_ahead_with_the_same_latents_and_moves_buffers_once(update: Any) -> None:
    module = Normed(lambda p: Extragradient(p, lr=0.1), update=update)
    torch.manual_seed(1)
    trainer().fit(module, DataLoader(points(20, 2), 10))
    plain = Normed(sgd(0.1), update=update)
    torch.manual_seed(1)
    trainer().fit(plain, DataLoader(points(20, 2), 10))
    half = len(module.draws) // 2
    per_step = 2 if update == "simultaneous" else 1  # evaluations of the generator in a step
    steps_of = [module.draws[i : i + 2 * per_step] for i in range(0, 2 * half, 2 * per_step)]
    assert all(draws[:per_step] == draws[per_step:] for draws in steps_of)
    assert [x for draws in steps_of for x in draws[:per_step]] == plain.draws
    assert module.generator[1].num_batches_tracked == plain.generator[1].num_batches_tracked
    assert not any("anchor" in s for o in module.running_players.values() for s in o.optimizer.state.values())


def test_a_second_gradient_that_is_not_finite_changes_no_player() -> None:
    class Bad(Bilinear):
        def player_loss(self, name: str, batch: Any) -> Tensor:
            loss = super().player_loss(name, batch)
            return loss / 0 if len(self.calls) == 8 else loss

    module = Bad(update="simultaneous", optimizer=lambda p: Extragradient(p, lr=0.1, weight_decay=0.1))
    good: list[tuple[float, float]] = []
    module.on_game_update = lambda: good.append(module.values())  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="no player has stepped"):
        trainer().fit(module, steps(8))
    assert module.game_updates == len(good) == 1
    assert module.values() == good[-1]


def test_settings_that_two_gradients_exclude() -> None:
    two: Any = lambda p: Extragradient(p, lr=0.1)  # noqa: E731
    fails(
        Bilinear(update="simultaneous", optimizers={"x": two, "y": sgd(0.1)}),
        MisconfigurationException,
        "must need equally many gradients",
    )
    fails(
        Bilinear(optimizer=two, loop=GameLoop(accumulate_grad_batches=2)),
        MisconfigurationException,
        "cannot accumulate over several",
    )
    mixed = Bilinear(optimizers={"x": two, "y": sgd(0.1)})  # in turns it is well defined
    trainer().fit(mixed, steps(2))
    assert (mixed.game_updates, mixed.gradient_evaluations) == (1, 3)


@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_extragradient_updates_metrics_once(update: Any) -> None:
    class Measured(Sums):
        def __init__(self) -> None:
            super().__init__(update=update, optimizer=lambda p: Extragradient(p, lr=0.1))
            self.mean = MeanMetric()

        def player_loss(self, name: str, batch: Any) -> Tensor:
            loss = super().player_loss(name, batch)
            self.mean.update(loss.detach())
            return loss

    module = Measured()
    trainer().fit(module, BATCHES)
    evaluations = 8 if update == "simultaneous" else 4
    assert module.mean.weight == module.mean._update_count == evaluations
