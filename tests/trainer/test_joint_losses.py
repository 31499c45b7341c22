"""Losses of a running game beside its training: repeatable, and without side effects."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

from lightning_nested.demos import ZooGame
from lightning_nested.games import Bilinear
from lightning_nested.optim import ComplexSGD
from lightning_nested.trainer.joint_losses import RunningGame, is_game, joint_losses
from lightning_nested.trainer.random_stream import RandomStream
from tests.trainers import trainer


class Noisy(ZooGame):
    """Bilinear game with a random share of both losses."""

    share = 1.0

    def __init__(self) -> None:
        super().__init__(Bilinear(), optimizer=lambda p: ComplexSGD(p, lr=0.1))
        self.evaluations = 0

    def player_losses(self, names: Any, batch: Any) -> dict[str, Tensor]:
        self.evaluations += 1
        noise = self.share * torch.rand(1, dtype=torch.float64)
        return {name: noise * loss for name, loss in super().player_losses(names, batch).items()}


class Evaluate(Callback):
    """Evaluates the losses twice on one stream, then once with a change by ``prepare``."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        assert isinstance(pl_module, RunningGame)
        names, stream = list(pl_module.running_players), RandomStream(3)

        def prepare() -> None:
            pl_module.share = 2.0

        before = pl_module.evaluations, torch.get_rng_state()
        self.losses = [joint_losses(pl_module, names, 0, stream) for _ in range(2)]
        self.losses.append(joint_losses(pl_module, names, 0, stream, prepare=prepare))
        assert pl_module.evaluations == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        assert pl_module.share == 1.0
        self.parameters = [p for player in pl_module.running_players.values() for p in player.parameters]


def test_losses_repeat_and_leave_nothing_behind() -> None:
    evaluate = Evaluate()
    trainer(evaluate, max_epochs=-1, max_steps=2).fit(Noisy())
    first, second, doubled = (torch.stack(losses).detach() for losses in evaluate.losses)
    assert torch.equal(first, second)
    torch.testing.assert_close(doubled, 2 * first, rtol=1e-15, atol=0)
    for loss in evaluate.losses[0]:  # each has its graph to every player
        assert all(g is not None for g in torch.autograd.grad(loss, evaluate.parameters, retain_graph=True))


def test_games_are_told_by_their_protocol() -> None:
    assert is_game(Noisy())
    assert not is_game(BoringModel())
