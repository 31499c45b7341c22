"""Modes, logs and messages around an evaluation beside the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_nested.trainer.isolation import add_note, evaluation_mode, without_trace
from lightning_nested.trainer.silent_loggers import SilentLogger
from tests.trainers import trainer


def test_evaluation_mode_restores_the_mode_of_each_part() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    module[1].eval()
    with evaluation_mode(module):
        assert not any(m.training for m in module.modules())
        module[1].train()  # dropout at evaluation
    assert [m.training for m in module.modules()] == [True, True, False, False]


def test_loggers_can_be_read_but_not_written(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version=3)
    module = LightningModule()
    module.trainer = trainer(logger=logger, folder=tmp_path)
    with without_trace(module, module.trainer):
        silent: Any = module.logger
        assert isinstance(silent, CSVLogger)
        assert (silent.log_dir, silent.name, silent.version) == (logger.log_dir, "run", 3)
        assert module.trainer.log_dir == logger.log_dir
        silent.log_metrics({"loss": 1.0}, step=0)
        silent.log_hyperparams({"lr": 1.0})
        silent.anything = 1
        silent.experiment.log_metrics({"loss": 1.0}, 0)
        silent.experiment["loss"].append(1.0)
        with silent.experiment as experiment:
            experiment.save()
        module.log("loss", 1.0)
        module.trainer.should_stop = True
        with pytest.raises(AttributeError):
            _ = silent.unknown
    assert module.logger is logger
    assert not hasattr(logger, "anything")
    assert not module.trainer.should_stop
    logger.save()
    assert not (tmp_path / "run" / "version_3" / "metrics.csv").exists()


def test_getters_of_a_silent_experiment_answer() -> None:
    class Experiment:
        def get_logdir(self) -> str:
            return "here"

        def add_scalar(self, name: str, value: float) -> float:
            raise AssertionError

    silent: Any = SilentLogger(Experiment())
    assert silent.get_logdir() == "here"
    assert silent.add_scalar("a", 1.0) is None


class OldError(Exception):
    """As exceptions were in Python 3.10."""

    @property
    def add_note(self) -> Any:  # type: ignore[override]
        raise AttributeError


def test_notes_without_add_note() -> None:
    error = OldError("a message")
    add_note(error, "a note")
    assert str(error) == "a message\na note"
    add_note(OldError(), "nothing to add it to")


def test_the_caller_is_named() -> None:
    module = LightningModule()
    module.trainer = trainer()

    def evaluate() -> None:
        with without_trace(module, module.trainer, caller="Called by a test"):
            raise OldError("a message")

    with pytest.raises(OldError, match="a message\nCalled by a test"):
        evaluate()
