"""Resumed games, second fits, and games on two processes."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nested.modules import GameLoop
from lightning_nested.trainer.random_stream import random_states, restore_random_state
from tests.modules.game.games import BATCHES, GAN, Sums, points, same, tensors
from tests.trainers import trainer


class Save(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        state = {"weights": tensors(pl_module), "updates": pl_module.game_updates, "draw": torch.rand(3)}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


class Split(GAN):
    """Each process takes its half of every batch, so that the global batch is that of a single process."""

    def player_loss(self, name: str, batch: Any) -> Tensor:
        rank, n = self.trainer.global_rank, self.trainer.world_size
        return super().player_loss(name, (batch[0][rank::n],))


@pytest.mark.parametrize(
    ("update", "loop"),
    [
        ("alternating", GameLoop(gradient_clip_val=0.3)),
        ("simultaneous", GameLoop(accumulate_grad_batches=2, gradient_clip_val={"generator": 0.2})),
    ],
)
def test_two_processes_with_half_the_batch_are_one_with_the_whole(
    update: Any, loop: GameLoop, tmp_path: Path
) -> None:
    def run(*callbacks: Callback, **options: Any) -> Split:
        each = {"discriminator": 4} if update == "alternating" else None
        module = Split(update=update, loop=loop, steps_per_player=each)
        fit = trainer(*callbacks, max_epochs=-1, max_steps=20, use_distributed_sampler=False, **options)
        fit.fit(module, DataLoader(points(70), batch_size=10))
        return module

    run(Save(tmp_path), devices=2, strategy="ddp_fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    same(first["weights"], second["weights"])
    assert first["updates"] == second["updates"] == 20
    assert not torch.equal(first["draw"], second["draw"]), "each process draws its own latents"
    same(first["weights"], tensors(run()), rtol=1e-10)


class Resumable:
    """A loader that goes on where it was, so that a run can be resumed inside an epoch."""

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Any:
        while self.position < 7:
            self.position += 1
            yield [points(70, 2).tensors[0][10 * self.position - 10 : 10 * self.position]]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class At(Callback):
    """Saves a checkpoint after some batches."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches, self.seen = path, batches, 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.batches:
            trainer.save_checkpoint(self.path)


GAMES: dict[str, Callable[[], GAN]] = {
    "turns": lambda: GAN(scheduler=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)),
    "turns, accumulated": lambda: GAN(loop=GameLoop(accumulate_grad_batches=2)),
    "together": lambda: GAN(update="simultaneous", steps_per_player=None, reuse_fakes=True),
}


def assert_same_run(a: tuple[GAN, Trainer], b: tuple[GAN, Trainer]) -> None:
    same(tensors(a[0]), tensors(b[0]))
    for mine, other in zip(a[1].optimizers, b[1].optimizers, strict=True):
        torch.testing.assert_close(mine.state_dict(), other.state_dict(), rtol=0, atol=0)
    clocks = [(m.game_updates, m.gradient_evaluations, t.global_step) for m, t in (a, b)]
    assert clocks[0] == clocks[1]
    assert a[1].current_epoch == b[1].current_epoch
    assert clocks[0][0] == clocks[0][2]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize("limit", [{}, {"max_steps": 1000}], ids=["epochs", "steps"])
@pytest.mark.parametrize("name", GAMES)
def test_resuming_at_an_epochs_end_is_bit_exact(name: str, limit: dict[str, int], tmp_path: Path) -> None:
    """Seven batches an epoch and five a round: every epoch ends inside a round."""

    def run(
        epochs: int, path: Path | None = None, *callbacks: Callback, **options: Any
    ) -> tuple[GAN, Trainer]:
        torch.manual_seed(path is None)  # a resumed run must not depend on the seed it is started with
        module, fit = GAMES[name](), trainer(*callbacks, max_epochs=epochs, **limit, **options)
        torch.manual_seed(5 + (path is None))
        loader = DataLoader(points(70, 2), batch_size=10, shuffle=True)
        fit.fit(module, loader, ckpt_path=path, weights_only=True)
        return module, fit

    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_on_train_epoch_end=True)
    run(2, None, save, enable_checkpointing=True)
    assert_same_run(run(4, tmp_path / "epoch=1.ckpt"), run(4))


@pytest.mark.parametrize("batches", [3, 9, 11])
@pytest.mark.parametrize("name", GAMES)
def test_resuming_inside_an_epoch_is_bit_exact(name: str, batches: int, tmp_path: Path) -> None:
    def run(path: Path | None = None, *callbacks: Callback) -> tuple[GAN, Trainer]:
        module, fit = GAMES[name](), trainer(*callbacks, max_epochs=4)
        torch.manual_seed(5 + (path is None))
        fit.fit(module, Resumable(), ckpt_path=path, weights_only=True)
        return module, fit

    whole = run(None, At(tmp_path / "open.ckpt", batches))
    assert_same_run(run(tmp_path / "open.ckpt"), whole)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_two_processes_resume_with_their_own_random_numbers(tmp_path: Path) -> None:
    def run(epochs: int, path: Path | None, folder: str, *callbacks: Callback, **options: Any) -> None:
        (tmp_path / folder).mkdir()
        saving = Save(tmp_path / folder)
        fit = trainer(saving, *callbacks, max_epochs=epochs, devices=2, strategy="ddp_fork", **options)
        torch.manual_seed(5 + (path is None))
        loader = DataLoader(points(70, 2), batch_size=5, shuffle=True)
        fit.fit(GAMES["turns"](), loader, ckpt_path=path, weights_only=True)

    save = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_on_train_epoch_end=True)
    run(1, None, "first", save, enable_checkpointing=True)
    run(2, tmp_path / "saved" / "epoch=0.ckpt", "second")
    run(2, None, "whole")
    for rank in (0, 1):
        a, b = (torch.load(tmp_path / folder / f"{rank}.pt") for folder in ("second", "whole"))
        same(a["weights"], b["weights"])
        assert torch.equal(a["draw"], b["draw"])


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


def test_a_round_of_another_schedule_starts_again_and_missing_keys_are_named(tmp_path: Path) -> None:
    """In the middle of a round of one step of x and two of y."""
    run = trainer(At(tmp_path / "a.ckpt", 2), limit_train_batches=3)
    run.fit(Sums(steps_per_player={"y": 2}), BATCHES)
    other, order = Sums(steps_per_player={"x": 2}), []
    other.on_player_step = order.append  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="the round starts again"):
        trainer(max_epochs=2).fit(other, BATCHES, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert order[:3] == ["x", "x", "y"]
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["game"]["position"] == 2
    del checkpoint["game"]["random"]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="state of GameModule must have 'random'"):
        trainer(max_epochs=2).fit(Sums(), BATCHES, ckpt_path=tmp_path / "a.ckpt", weights_only=True)


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


def test_an_optimizer_of_another_class_is_named(tmp_path: Path) -> None:
    class Other(GAN):
        def configure_optimizers(self) -> Any:
            first, *rest = self.players().values()
            return [torch.optim.Adam(first.parameters()), *(torch.optim.SGD(m.parameters()) for m in rest)]

    def loader() -> DataLoader[Any]:
        return DataLoader(points(20), batch_size=10)

    class Adams(GAN):
        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(m.parameters()) for m in self.players().values()]

    fit = trainer(max_epochs=1)
    fit.fit(Adams(), loader())
    path = tmp_path / "saved.ckpt"
    fit.save_checkpoint(path)
    second = list(Adams().players())[1]
    match = f"Got SGD for '{second}', whose saved Adam has no momentum"
    with pytest.raises(MisconfigurationException, match=match):
        trainer(max_epochs=2).fit(Other(), loader(), ckpt_path=path, weights_only=False)
