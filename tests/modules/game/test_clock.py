"""Game updates as the clock of schedulers, loggers, checkpoints and weight averaging."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from tests.modules.game.games import (
    BATCHES,
    Bilinear,
    Sums,
    sgd,
    steps,
)
from tests.trainers import trainer


def test_schedulers_step_with_game_updates() -> None:
    rates: list[list[float]] = []

    class Watch(Bilinear):
        def on_game_update(self) -> None:
            rates.append([o.param_groups[0]["lr"] for o in self.trainer.optimizers])

    halve: Any = lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)  # noqa: E731
    module = Watch(steps_per_player={"x": 2}, optimizer=sgd(0.1), schedulers={"y": halve})
    trainer().fit(module, steps(15))
    assert [r[0] for r in rates] == [0.1] * 5
    assert [r[1] for r in rates] == [0.1, 0.1, 0.05, 0.05, 0.025]


def test_the_trainers_clock_counts_game_updates(tmp_path: Path) -> None:
    class Logger(CSVLogger):
        logged: ClassVar[list[tuple[int, set[str]]]] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.logged.append((step or 0, set(metrics)))

    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit = trainer(
        save,
        folder=tmp_path,
        max_epochs=-1,
        max_steps=8,
        enable_checkpointing=True,
        logger=Logger(tmp_path),
        log_every_n_steps=4,
    )
    module = Bilinear(steps_per_player={"x": 4}, optimizer=sgd(0.01))
    fit.fit(module, steps(7))
    assert (module.game_updates, fit.global_step, len(module.calls)) == (8, 8, 40)
    assert {path.name for path in (tmp_path / "saved").glob("*.ckpt")} == {"step=3.ckpt", "step=6.ckpt"}
    assert Logger.logged == [(4, {"x_loss", "y_loss"}), (8, {"x_loss", "y_loss"})]
    assert fit.callback_metrics["game_updates"] == 8


def test_lightnings_weight_averaging_counts_game_updates() -> None:
    averaging = EMAWeightAveraging(decay=0.5, update_every_n_steps=2)
    module = Bilinear(steps_per_player={"x": 4})
    kept: list[tuple[float, float]] = []
    module.on_game_update = lambda: kept.append(module.values())  # type: ignore[method-assign]
    trainer(averaging).fit(module, steps(20))  # four game updates
    assert len(kept) == 4
    first, third = kept[0], kept[2]  # Lightning counts steps from 0; its first average is a copy
    expected = tuple(0.5 * a + 0.5 * b for a, b in zip(first, third, strict=True))
    assert module.values() == pytest.approx(expected, rel=1e-12)  # the average replaces the last weights


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
    fit = trainer(EarlyStopping("x_loss", patience=5, check_on_train_epoch_end=True), max_epochs=3)
    fit.fit(module, BATCHES)
    assert fit.callback_metrics["x_loss"] == pytest.approx(module._steps.losses["x"].item())
    assert fit.callback_metrics["game_updates"] == 6
