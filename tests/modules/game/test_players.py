"""Players and their optimizers: matched, frozen and unfrozen, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_nested.modules import GameLoop
from tests.modules.game.games import BATCHES, Bilinear, Scalar, Sums, fails, sgd, steps
from tests.trainers import trainer


def test_optimizers_of_ones_own_in_any_order() -> None:
    class Own(Bilinear):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.y.parameters(), 0.2), torch.optim.SGD(self.x.parameters(), 0.1)]

    module = Own(update="simultaneous")
    trainer().fit(module, steps(1))
    assert module.values() == pytest.approx((1 - 0.1 * 0.5, 0.5 + 0.2), rel=1e-14)


@pytest.mark.parametrize(
    ("held", "match"),
    [
        ([["x", "y"]], r"exactly one player. Got a SGD with parameters of \['x', 'y'\]"),
        ([["x"], ["x"], ["y"]], "Got two for 'x'"),
        ([["x"]], r"Got none for \['y'\]"),
        ([["x"], ["y"], ["other"]], r"Got a SGD with parameters of \['no player'\]"),
    ],
)
def test_optimizers_that_do_not_fit_the_players(held: list[list[str]], match: str) -> None:
    class Own(Bilinear):
        def __init__(self) -> None:
            super().__init__()
            self.other = Scalar(3.0)

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD([getattr(self, n).value for n in names], 0.1)  # a parameter may be held twice
                for names in held
            ]

    fails(Own(), MisconfigurationException, match)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"optimizers": {"x": sgd(0.1), "z": sgd(0.1)}}, r"optimizers must name players. Got \['z'\]"),
        ({"optimizers": {"x": sgd(0.1)}}, r"must have an optimizer. Got none for 'y'"),
        ({"schedulers": {"z": None}}, r"schedulers must name players. Got \['z'\]"),
        (
            {"loop": GameLoop(gradient_clip_val={"z": 1.0})},
            r"gradient_clip_val must name players. Got \['z'\]",
        ),
    ],
)
def test_names_that_are_no_players(options: Any, match: str) -> None:
    fails(Bilinear(**options), MisconfigurationException, match)


def test_shared_parameters() -> None:
    module = Bilinear()
    module.y.value = module.x.value
    fails(module, MisconfigurationException, r"must not share parameters.*'x.value' in both 'x' and 'y'")


class Do(Callback):
    """Something before a batch."""

    def __init__(self, batch: int, action: Any) -> None:
        self.batch, self.action = batch, action

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.action(trainer, module)


def after(frozen: int, free: int) -> list[float]:
    """x₁, x₂, y₁, y₂ after simultaneous steps, the first ones with x₂ frozen, the last ones with it free."""
    x, y = [1.0, 0.0], [0.5, 0.0]
    for k in range(frozen + free):
        dx, dy = 0.1 * sum(y), 0.1 * sum(x)
        x = [x[0] - dx, x[1] - (dx if k >= frozen else 0.0)]
        y = [y[0] + dy, y[1] + dy]
    return x + y


@pytest.mark.parametrize("held", [True, False])
def test_parameters_unfrozen_in_training_are_trained(held: bool) -> None:
    class Own(Sums):
        def configure_optimizers(self) -> Any:
            players = self.players().values()
            return [
                torch.optim.SGD([p for p in m.parameters() if held or p.requires_grad], 0.1) for m in players
            ]

    def unfreeze(fit: Trainer, module: Own) -> None:
        module.x.b.requires_grad_(True)
        if not held:
            fit.optimizers[0].add_param_group({"params": [module.x.b]})

    module = Own(update="simultaneous")
    module.x.b.requires_grad_(False)
    trainer(Do(2, unfreeze)).fit(module, BATCHES)
    assert module.values() == pytest.approx(after(2, 2), rel=1e-14)
    assert len(module.running_players["x"].parameters) == 2


def test_parameters_frozen_in_training_stay_and_open_sums_begin_anew() -> None:
    module = Sums(update="simultaneous", loop=GameLoop(accumulate_grad_batches=2))
    freeze = Do(1, lambda _, m: m.x.b.requires_grad_(False))
    trainer(freeze).fit(module, BATCHES)  # batch 0 is dropped; 1 and 2; 3 alone
    assert module.values() == pytest.approx(after(2, 0), rel=1e-14)
    assert module.game_updates == 2


def test_players_may_share_a_frozen_part_but_not_a_trained_one() -> None:
    class Shared(Sums):
        def __init__(self, free: bool) -> None:
            super().__init__()
            self.x.common = self.y.common = nn.Linear(1, 1).requires_grad_(free)

    trainer().fit(Shared(free=False), BATCHES)
    with pytest.raises(MisconfigurationException, match="must not share parameters"):
        trainer().fit(Shared(free=True), BATCHES)


@pytest.mark.parametrize("own", [True, False])
def test_a_player_with_nothing_to_train_is_named(own: bool) -> None:
    class Own(Sums):
        def configure_optimizers(self) -> Any:
            if not own:
                return super().configure_optimizers()
            return [torch.optim.SGD(p.parameters(), 0.1) for p in self.players().values()]

    module = Own()
    module.y.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="Got 'y' with all of them frozen; unfreeze some"):
        trainer().fit(module, BATCHES)


def test_a_player_without_parameters_is_named() -> None:
    class Empty(Sums):
        def players(self) -> dict[str, nn.Module]:
            return {"x": self.x, "y": nn.Identity()}

    with pytest.raises(MisconfigurationException, match="Got 'y' without parameters"):
        trainer().fit(Empty(), BATCHES)


@pytest.mark.parametrize(
    ("players", "match"),
    [
        (lambda m: [m.x, m.y], "from names to modules. Got a list"),
        (lambda m: {"x": m.x, "y": m.y.a}, "from names to modules. Got 'y': Parameter"),
        (lambda _: {}, "at least one player. Got none"),
    ],
)
def test_players_that_are_not_modules_by_name(players: Any, match: str) -> None:
    module = Sums()
    module.players = lambda: players(module)  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match=match):
        trainer().fit(module, BATCHES)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, "a closure of its own"])
def test_an_optimizer_that_needs_a_closure_is_refused(kind: Any) -> None:
    class Closing(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            return closure()

    module = Sums(optimizer=lambda p: (Closing if isinstance(kind, str) else kind)(p, lr=0.1))
    with pytest.raises(
        MisconfigurationException, match=r"Got (LBFGS|Closing), whose step\(\) needs a closure; use"
    ):
        trainer().fit(module, BATCHES)
