"""Warning filters of a fit end with it, also by an exception."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_nested.demos import ZooGame
from lightning_nested.games import Bilinear
from lightning_nested.optim import ComplexSGD
from tests.trainers import trainer


class Fail(Callback):
    """Raises an exception after a batch."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("once")


def test_filters_are_restored(tmp_path: Any) -> None:
    before = list(warnings.filters)
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    module = ZooGame(Bilinear(), optimizer=lambda p: ComplexSGD(p, lr=0.1))
    fit = trainer(save, enable_checkpointing=True, max_epochs=-1, max_steps=2)
    fit.fit(module)  # Lightning's advice would be an error
    assert list(tmp_path.iterdir())
    assert warnings.filters == before
    with pytest.raises(RuntimeError, match="once"):
        trainer(Fail()).fit(module)
    assert warnings.filters == before
