"""GameModule where users leave the straight path: schedulers that watch, frozen parts, second fits."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_nested.modules import GameLoop, GameModule
from lightning_nested.optim import Extragradient
from lightning_nested.trainer.random_stream import random_states, restore_random_state

BATCHES = DataLoader(torch.ones(4, dtype=torch.float64), batch_size=1)


def trainer(**options: Any) -> Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "devices": 1, **options}
    return Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


class Pair(nn.Module):
    """Two numbers; the player's strategy is their sum."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.a + self.b


class Sums(GameModule):
    """min over x, max over y of the batch's number times (x₁+x₂)(y₁+y₂)."""

    def __init__(self, **kw: Any) -> None:
        super().__init__(**{"optimizer": lambda params: torch.optim.SGD(params, lr=0.1), **kw})
        self.x, self.y = Pair(1.0, 0.0), Pair(0.5, 0.0)

    def players(self) -> dict[str, nn.Module]:
        return {"x": self.x, "y": self.y}

    def player_loss(self, name: str, batch: Any) -> Tensor:
        product = batch.mean() * self.x() * self.y()
        return product if name == "x" else -product

    def values(self) -> list[float]:
        return [p.item() for p in self.parameters()]


# ---- schedulers and logged losses


def test_a_plateau_scheduler_steps_on_its_metric_after_each_epoch() -> None:
    class Constant(Sums):
        def on_game_update(self) -> None:
            self.log("watched", 1.0)

    def plateau(optimizer: Any) -> Any:
        return ReduceLROnPlateau(optimizer, monitor="watched", patience=0, factor=0.5)

    module = Constant(schedulers={"x": plateau})
    fit = trainer(max_epochs=4)
    fit.fit(module, BATCHES)
    rates = [o.param_groups[0]["lr"] for o in fit.optimizers]
    assert rates == [0.1 * 0.5**3, 0.1]  # the first epoch sets the mark, three do not beat it


def test_a_plateau_scheduler_honours_its_frequency() -> None:
    class Own(Sums):
        def configure_optimizers(self) -> Any:
            x, y = (torch.optim.SGD(p.parameters(), lr=0.1) for p in self.players().values())
            scheduler = ReduceLROnPlateau(y, monitor="watched", patience=0, factor=0.5)
            return [x, y], [{"scheduler": scheduler, "frequency": 2}]

        def on_game_update(self) -> None:
            self.log("watched", 1.0)

    fit = trainer(max_epochs=5)
    fit.fit(Own(), BATCHES)
    assert [o.param_groups[0]["lr"] for o in fit.optimizers] == [0.1, 0.05]  # after epochs 2 and 4


def test_a_plateau_scheduler_of_the_interval_step_follows_game_updates() -> None:
    """It sees the metric of the same update, among them the losses, which the module logs itself."""

    class Own(Sums):
        def configure_optimizers(self) -> Any:
            x, y = (torch.optim.SGD(p.parameters(), lr=0.1) for p in self.players().values())
            watch = [
                ReduceLROnPlateau(o, monitor=name, patience=0, factor=0.5, threshold=0.0)
                for o, name in ((x, "watched"), (y, "y_loss"))
            ]
            return [x, y], [
                {"scheduler": s, "interval": "step", "frequency": n}
                for s, n in zip(watch, (1, 2), strict=True)
            ]

        def on_game_update(self) -> None:
            self.log("watched", float(self.game_updates > 2))  # 0, 0, 1, 1

    module = Own(update="simultaneous")
    fit = trainer(max_epochs=1)
    fit.fit(module, DataLoader(torch.ones(4)))
    x, y = (config.scheduler for config in fit.lr_scheduler_configs)
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**3
    assert (x.last_epoch, y.last_epoch) == (4, 2)
    assert min(x.best, 1.0) == 0.0
    assert y.best <= float(module._steps.losses["y"]) + 1e-6


def test_a_plateau_scheduler_without_monitor_is_refused() -> None:
    module = Sums(scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o))
    with pytest.raises(MisconfigurationException, match=r"cli.ReduceLROnPlateau\(optimizer, monitor="):
        trainer().fit(module, BATCHES)


def test_a_plateau_scheduler_of_a_metric_that_is_not_logged() -> None:
    module = Sums(scheduler=lambda o: ReduceLROnPlateau(o, monitor="absent"))
    with pytest.raises(MisconfigurationException, match=r"monitors 'absent', which was not logged. Got \["):
        trainer().fit(module, BATCHES)


def test_losses_can_be_monitored_in_epochs_shorter_than_log_every_n_steps() -> None:
    module = Sums()
    fit = trainer(
        max_epochs=3, callbacks=[EarlyStopping("x_loss", patience=5, check_on_train_epoch_end=True)]
    )
    fit.fit(module, BATCHES)
    assert fit.callback_metrics["x_loss"] == pytest.approx(module._steps.losses["x"].item())
    assert fit.callback_metrics["game_updates"] == 6


# ---- frozen parts


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
    trainer(callbacks=[Do(2, unfreeze)]).fit(module, BATCHES)
    assert module.values() == pytest.approx(after(2, 2), rel=1e-14)
    assert len(module.running_players["x"].parameters) == 2


def test_parameters_frozen_in_training_stay_and_open_sums_begin_anew() -> None:
    module = Sums(update="simultaneous", loop=GameLoop(accumulate_grad_batches=2))
    freeze = Do(1, lambda _, m: m.x.b.requires_grad_(False))
    trainer(callbacks=[freeze]).fit(module, BATCHES)  # batch 0 is dropped; 1 and 2; 3 alone
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


# ---- second fits


class Validated(Sums):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def val_dataloader(self) -> Any:
        return BATCHES


@pytest.mark.parametrize("how", ["validate", "load_from_checkpoint"])
def test_a_checkpoint_read_for_its_weights_does_not_move_the_next_fits_clock(
    how: str, tmp_path: Path
) -> None:
    fit = trainer(max_epochs=3)
    fit.fit(Validated(), BATCHES)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    module, again = Validated(), trainer()
    if how == "validate":
        again.validate(module, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    else:
        module = Validated.load_from_checkpoint(tmp_path / "a.ckpt")
    again.fit(module, BATCHES)
    assert (module.game_updates, again.global_step, module.gradient_evaluations) == (2, 2, 4)
    resumed = trainer(max_epochs=4)
    resumed.fit(module, BATCHES, ckpt_path=tmp_path / "a.ckpt")
    assert (module.game_updates, resumed.global_step, module.gradient_evaluations) == (8, 8, 16)


def test_a_finished_run_that_is_resumed_knows_its_clock(tmp_path: Path) -> None:
    fit = trainer(max_epochs=3)
    fit.fit(Sums(), BATCHES)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    module = Sums()
    trainer(max_epochs=3).fit(module, BATCHES, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert (module.game_updates, module.gradient_evaluations) == (6, 12)


def test_a_new_trainer_begins_a_round_of_its_own() -> None:
    class Fragile(Sums):
        fails = True

        def player_loss(self, name: str, batch: Any) -> Tensor:
            if self.fails and self.trainer.fit_loop.epoch_loop.batch_idx == 3:
                raise RuntimeError("once")
            return super().player_loss(name, batch)

    module = Fragile(steps_per_player={"x": 2}, loop=GameLoop(accumulate_grad_batches=2))
    with pytest.raises(RuntimeError, match="once"):
        trainer().fit(module, BATCHES)
    module.fails = False
    module.load_state_dict(Sums().state_dict())
    trainer(limit_train_batches=1).fit(module, BATCHES)
    assert module.values() == pytest.approx([0.95, -0.05, 0.5, 0.0], rel=1e-14)
    assert (module.game_updates, module.gradient_evaluations) == (0, 1)
    trainer(limit_train_batches=3).fit(module, BATCHES)
    assert module.gradient_evaluations == 3
    assert module.values()[2:] == [0.5, 0.0]  # x steps first again


@pytest.mark.parametrize("steps", [2, 4])
def test_the_same_trainer_goes_on(steps: int) -> None:
    """Also where the first fit ends inside the first round."""
    module, fit = Sums(steps_per_player={"x": steps}), trainer()
    fit.fit(module, BATCHES)
    fit.fit_loop.max_epochs = 3
    fit.fit(module, BATCHES)
    updates = 12 // (steps + 1)
    assert (module.game_updates, fit.global_step, module.gradient_evaluations) == (updates, updates, 12)


# ---- what a step leaves behind


@pytest.mark.parametrize("shape", [(), (3,)])
def test_gradients_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    """Of a + b autograd answers with one tensor for both; of a sum with an expanded number."""

    class InPlace(Sums):
        def __init__(self) -> None:
            super().__init__()
            for player in (self.x, self.y):
                player.a, player.b = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in "ab")

        def player_loss(self, name: str, batch: Any) -> Tensor:
            return self.players()[name]().sum()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for p in optimizer.param_groups[0]["params"]:
                p.grad.mul_(0.5)

    module = InPlace()
    trainer().fit(module, BATCHES)
    for p in module.parameters():
        torch.testing.assert_close(p.detach(), torch.full(shape, -0.1, dtype=torch.float64))


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


def test_processes_that_a_checkpoint_does_not_know_draw_numbers_of_their_own() -> None:
    torch.manual_seed(3)
    saved = random_states(trainer())
    draws = []
    for rank in range(3):
        torch.manual_seed(3)
        with pytest.warns(UserWarning, match="of 1 processes") if rank == 1 else nullcontext():
            restore_random_state(saved, rank)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert all(len(set(column)) == 3 for column in zip(*draws, strict=True))


# ---- what is refused, and how


@pytest.mark.parametrize("count", [1.5, 2.0, "2", True])
def test_steps_per_player_are_whole_numbers(count: Any) -> None:
    with pytest.raises(ValueError, match=r"must be whole numbers. Got .* for 'x'"):
        Sums(steps_per_player={"x": count})


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


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start"])
def test_a_hook_overridden_without_super_is_named(hook: str) -> None:
    module = Sums()
    setattr(module, hook, lambda *_, **__: None)
    with pytest.raises(MisconfigurationException, match="overrides one without calling super"):
        trainer().fit(module, BATCHES)
