"""Epochs of so many steps without batches."""

from __future__ import annotations

import pytest

from lightning_nested import StepsDataModule
from lightning_nested.modules import LoopOptions, Unrolled
from tests.modules.nested.problems import ridge
from tests.trainers import trainer


def test_a_cycle_is_as_long_as_an_epoch_that_needs_no_batches() -> None:
    module = ridge(gradient=Unrolled(num_steps=10))
    fit = trainer(max_epochs=3)
    fit.fit(module, datamodule=StepsDataModule(steps=20, val_steps=2))
    assert (module.inner_steps, module.outer_steps) == (60, 6)
    assert module.calls == {"inner": 60, "outer": 6 + 3 * 2}
    # Lightning's means over an epoch are weighed by the sizes of batches.
    assert fit.callback_metrics["val_loss"].isfinite()


def test_the_epoch_that_a_warning_advises_is_long_enough() -> None:
    def fit(steps: int) -> None:
        module = ridge(gradient=Unrolled(num_steps=4), loop=LoopOptions(accumulate_grad_batches=3))
        trainer().fit(module, datamodule=StepsDataModule(steps))

    with pytest.warns(UserWarning, match=r"Got Unrolled.* with 2: .* StepsDataModule\(steps=12\)"):
        fit(4)
    fit(12)  # warnings are errors here


@pytest.mark.parametrize("options", [{"steps": 0}, {"val_steps": 0}], ids=["steps", "val_steps"])
def test_refusals(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))} must be at least 1. Got 0"):
        StepsDataModule(**options)
