"""Epochs of so many steps without batches."""

from __future__ import annotations

import pytest

from lightning_nested import StepsDataModule
from lightning_nested.modules import Unrolled
from tests.modules.nested.problems import ridge
from tests.trainers import trainer


def test_a_cycle_is_as_long_as_an_epoch_that_needs_no_batches() -> None:
    module = ridge(gradient=Unrolled(num_steps=10))
    trainer(max_epochs=3).fit(module, datamodule=StepsDataModule(steps=20, val_steps=2))
    assert (module.inner_steps, module.outer_steps) == (60, 6)
    assert module.calls == {"inner": 60, "outer": 6 + 3 * 2}


@pytest.mark.parametrize("options", [{"steps": 0}, {"val_steps": 0}], ids=["steps", "val_steps"])
def test_refusals(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))} must be at least 1. Got 0"):
        StepsDataModule(**options)
