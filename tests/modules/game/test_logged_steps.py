"""One clock in a run: all that is logged in a game stands at game updates, whoever logs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor, ThroughputMonitor
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_nested.callbacks import GameSpectrumCallback
from lightning_nested.modules import GameLoop
from tests.modules.game.games import Bilinear, sgd, steps
from tests.trainers import trainer


class Rows(Logger):
    """Keeps what is logged, as ``(step, metrics)``."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name = version = "rows"

    def log_hyperparams(self, *_: Any) -> None:
        """Keep nothing."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def steps(self, name: str) -> list[int | None]:
        return [step for step, metrics in self.rows if name in metrics]

    def points(self, name: str) -> list[tuple[int | None, float]]:
        return [(step, float(metrics[name])) for step, metrics in self.rows if name in metrics]


class Logs(Bilinear):
    """Logs its game updates in every hook in which a user may log; updates of five batches."""

    def __init__(self, **kw: Any) -> None:
        super().__init__(**{"optimizer": sgd(0.01), "steps_per_player": {"x": 4}, **kw})

    def player_loss(self, name: str, batch: Any) -> Tensor:
        self.log(f"begun_{name}", float(self.game_updates))
        return super().player_loss(name, batch)

    def on_game_update(self) -> None:
        self.log("ended", float(self.game_updates))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validated", float(self.game_updates), on_step=True, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        self.log("closed", float(self.game_updates))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("tested", float(self.game_updates))


def halved(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


@pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`")
def test_everything_stands_at_game_updates() -> None:
    logger, module = Rows(), Logs(scheduler=halved)
    throughput = ThroughputMonitor(lambda batch: len(batch[0]))
    callbacks = LearningRateMonitor(), GameSpectrumCallback(k=None, every_n_updates=2), throughput
    options: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 8, "log_every_n_steps": 1}
    trainer(*callbacks, logger=logger, **options).fit(module, steps(18), steps(2))
    # Each epoch has 18 batches: the rounds end in batches 5, 10, 15 of the first, and 2, 7, 12, 17 of the second.
    assert module.game_updates == 7
    updates = list(range(1, 8))
    assert logger.points("ended") == [(n, n) for n in updates]
    assert logger.points("begun_x") == [(n, n - 1) for n in updates]
    assert logger.points("begun_y") == [(n, n - 1) for n in updates]
    assert logger.steps("x_loss") == updates
    assert logger.steps("spectrum/max_modulus") == [1, 2, 4, 6]
    assert logger.points("validated_epoch") == [(n, n) for n in (1, 3, 5, 6)]
    assert logger.points("validated_step") == [(n, n) for n in (1, 1, 3, 3, 5, 5, 6, 6)]
    assert logger.points("closed") == [(3, 3), (7, 7)]
    assert logger.steps("train/time") == updates
    assert set(logger.steps("validate/time")) <= {1, 3, 5, 6}
    # the rate that the optimizers have after n updates
    assert logger.points("lr-x") == [(n, pytest.approx(0.01 * 0.5**n)) for n in range(8)]
    assert {step for step, _ in logger.rows} <= set(range(8))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_logging_is_due_every_n_game_updates(accumulate: int) -> None:
    logger = Rows()
    module = Logs(scheduler=halved, loop=GameLoop(accumulate_grad_batches=accumulate))
    fit = trainer(LearningRateMonitor("step"), logger=logger, log_every_n_steps=3, max_epochs=1)
    fit.fit(module, steps(7 * 5 * accumulate), steps(1))
    assert module.game_updates == 7
    assert logger.steps("x_loss") == logger.steps("ended") == logger.steps("begun_x") == [3, 6]
    assert logger.points("lr-x") == [(n, pytest.approx(0.01 * 0.5**n)) for n in (0, 3, 6)]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
@pytest.mark.parametrize("stop", [3, 7, 10])
def test_a_resumed_run_logs_at_the_same_steps(tmp_path: Path, stop: int) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if args[-1] == stop:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    whole, rest = Rows(), Rows()
    options: dict[str, Any] = {"log_every_n_steps": 1, "max_epochs": 2}
    module = Logs(scheduler=halved)
    trainer(Save(), LearningRateMonitor(), logger=whole, **options).fit(module, steps(15), steps(2))
    resumed = Logs(scheduler=halved)
    second = trainer(LearningRateMonitor(), logger=rest, **options)
    second.fit(resumed, steps(15), steps(2), ckpt_path=tmp_path / "saved.ckpt", weights_only=False)
    names = "x_loss", "ended", "begun_x", "begun_y", "validated_epoch", "validated_step", "lr-x"
    for name in names:
        expected = [step for step in whole.steps(name) if step is not None]
        found = rest.steps(name)
        assert found == expected[len(expected) - len(found) :], name
    assert rest.steps("ended")


def test_validation_and_test_on_their_own(tmp_path: Path) -> None:
    logger, module = Rows(), Logs()
    fit = trainer(logger=logger)
    fit.fit(module, steps(15), steps(1))
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    fit.test(module, steps(2), verbose=False)
    assert logger.points("tested") == [(3, 3)]
    other = trainer(logger=(alone := Rows()))
    other.validate(Logs(), steps(2), ckpt_path=tmp_path / "saved.ckpt", verbose=False, weights_only=False)
    assert alone.points("validated_epoch") == [(3, 3)]


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("plain", float(batch_idx))
        return (self.w * batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("fails", [False, True])
def test_a_trainer_that_ran_a_game_gives_another_module_its_own_clock(fails: bool) -> None:
    class Fails(Logs):
        def on_game_update(self) -> None:
            if fails and self.game_updates == 2:
                raise KeyError("stop")

    logger = Rows()
    fit = trainer(logger=logger, max_epochs=1, log_every_n_steps=2)
    try:
        fit.fit(Fails(), steps(15), steps(1))
    except KeyError:
        assert fails
    fit.fit_loop.max_epochs = 1 if fails else 2
    fit.fit(Plain(), steps(6))
    expected = Rows()
    trainer(logger=expected, log_every_n_steps=2).fit(Plain(), steps(6))
    assert expected.points("plain") == [(1, 1), (3, 3), (5, 5)]
    assert logger.points("plain") == expected.points("plain")
