"""Losses, settings and hooks that GameModule refuses, before any player has moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_nested.optim import ComplexSGD
from tests.modules.game.games import BATCHES, Bilinear, Sums, fails, steps
from tests.trainers import trainer


def test_a_loss_that_does_not_depend_on_its_player() -> None:
    class Wrong(Bilinear):
        def player_loss(self, name: str, batch: Any) -> Tensor:
            return (self.y() ** 2).sum()

    fails(Wrong(), MisconfigurationException, "loss of 'x' must depend on its parameters")


def test_a_loss_without_graph_or_not_scalar() -> None:
    class Wrong(Bilinear):
        def player_loss(self, name: str, batch: Any) -> Tensor:
            return self.answer

    for answer, match in (
        (torch.zeros(2, requires_grad=True), r"scalar tensor for 'x'. Got shape \(2,\)"),
        (torch.zeros(()), "with its graph for 'x'"),
        (1.0, "Got float"),
    ):
        module = Wrong()
        module.answer = answer  # type: ignore[assignment]
        fails(module, MisconfigurationException, match)


@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_a_loss_that_is_not_finite_changes_no_player(update: Any) -> None:
    class Bad(Bilinear):
        def player_loss(self, name: str, batch: Any) -> Tensor:
            loss = super().player_loss(name, batch)
            return loss / 0 if name == "y" and self.game_updates == 1 else loss

    module = Bad(update=update)
    good: list[tuple[float, float]] = []
    module.on_player_step = lambda name: good.append(module.values())  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"loss of 'y'.*must be finite.*after 1 game updates"):
        trainer().fit(module, steps(8))
    assert module.values() == good[-1]
    assert module.game_updates == 1


def test_sharded_and_scaled_training_is_refused() -> None:
    module = Bilinear()
    fit = trainer()
    fit.precision_plugin.scaler = object()
    with pytest.raises(MisconfigurationException, match="use 'bf16-mixed'"):
        fit.fit(module, steps(1))


def test_momentum_out_of_range_is_refused_before_anything_moves() -> None:
    for options, match in (({"momentum": 1.0}, "Got 1.0"), ({"phase": 4.0}, "Got 4.0")):
        fails(Bilinear(optimizer=lambda p, o=options: ComplexSGD(p, lr=0.1, **o)), ValueError, match)


@pytest.mark.parametrize(
    ("losses", "match"),
    [
        (lambda m: {"x": m.x()}, r"for each of \['x', 'y'\]. Got \['x'\], without \['y'\]"),
        (lambda m: (m.x(), m.y()), "Got a tuple"),
    ],
)
def test_player_losses_that_lack_a_player(losses: Any, match: str) -> None:
    module = Sums(update="simultaneous")
    module.player_losses = lambda names, batch: losses(module)  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match=match):
        trainer().fit(module, BATCHES)


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start"])
def test_a_hook_overridden_without_super_is_named(hook: str) -> None:
    module = Sums()
    setattr(module, hook, lambda *_, **__: None)
    with pytest.raises(MisconfigurationException, match="overrides one without calling super"):
        trainer().fit(module, BATCHES)
