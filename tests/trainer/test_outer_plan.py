"""The plan of a run: its cost, what the user sets, and how the look ahead is tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.linalg.kronecker import KroneckerFisher
from lightning_nested.trainer.forecast import Forecast
from tests.callbacks.tuned_regression import Regression, data, smooth
from tests.trainers import trainer


def fitted(
    callback: HypergradientCallback, *, outer_batch: int = 8, epochs: int = 2
) -> HypergradientCallback:
    loaders = DataLoader(data(64, 1), 8), DataLoader(data(64, 2), outer_batch)
    trainer(callback, max_epochs=epochs).fit(Regression(smooth()), *loaders)
    return callback


def test_larger_outer_batches_cost_more_and_are_rarer() -> None:
    """One gradient of an outer batch for each inner batch that would fit into it, and one for the look ahead."""
    small, large = (fitted(HypergradientCallback(WeightDecay()), outer_batch=n) for n in (8, 32))
    assert small.plan.pace is not None
    assert large.plan.pace is not None
    assert (small.plan.pace.cost, large.plan.pace.cost) == (2.0, 5.0)
    assert (small.every_n_steps, large.every_n_steps) == (7, 17)  # ⌈cost / 0.3⌉


def test_what_is_set_between_two_fits_is_kept() -> None:
    callback = fitted(HypergradientCallback(WeightDecay(), every_n_steps=3))
    assert (callback.every_n_steps, callback.warmup_steps) == (3, 1)  # a tenth of 16 steps
    callback.every_n_steps, callback.warmup_steps = 1, 10
    fitted(callback, epochs=3)
    assert (callback.every_n_steps, callback.warmup_steps) == (1, 10)
    assert callback.outer_steps == 24 - 10  # another module: counted again


@pytest.mark.parametrize("same_trainer", [True, False])
def test_the_rate_of_a_second_fit_ends_at_zero_with_it(same_trainer: bool) -> None:
    """Inner and outer steps are counted on: the second fit has no warm-up, and other outer steps than the first."""
    callback, module = (
        HypergradientCallback(WeightDecay(), every_n_steps=3, warmup_steps=4),
        Regression(smooth()),
    )
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            rates.append(callback.outer.optimizer.param_groups[0]["lr"])

    loaders = DataLoader(data(64, 1), 8), DataLoader(data(64, 2), 8)
    fit = trainer(callback, Rates(), max_epochs=2)
    fit.fit(module, *loaders)
    # Inner steps 4, 7, 10 and 13 of 16.
    assert (callback.outer_steps, callback.plan.pace.outer_steps, rates[-1]) == (4, 4, 0.0)  # type: ignore[union-attr]
    if same_trainer:
        fit.fit_loop.max_epochs = 3
    else:
        fit = trainer(callback, Rates(), max_epochs=1)
    fit.fit(module, *loaders)
    # 16, 19 and 22 of 24.
    assert (callback.outer_steps, callback.plan.pace.outer_steps) == (7, 3)  # type: ignore[union-attr]
    assert rates[-8:] == pytest.approx([r * 0.25 for r in (2 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3, 0, 0)])


def test_a_checkpoint_of_a_second_fit_goes_on_with_its_schedule(tmp_path: Path) -> None:
    callback, module = (
        HypergradientCallback(WeightDecay(), every_n_steps=3, warmup_steps=4),
        Regression(smooth()),
    )
    loaders = DataLoader(data(64, 1), 8), DataLoader(data(64, 2), 8)
    fit = trainer(callback, folder=tmp_path, max_epochs=1)
    fit.fit(module, *loaders)
    fit.fit_loop.max_epochs = 2
    fit.fit(module, *loaders)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    # Steps 10 and 13 of 16 in the second epoch, and then 16, 19 and 22 of 24.
    resumed = HypergradientCallback(WeightDecay(), every_n_steps=3, warmup_steps=4)
    trainer(resumed, max_epochs=3).fit(Regression(smooth()), *loaders, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.outer.optimizer.param_groups[0]["lr"] == 0.0
    assert resumed.plan.pace.outer_steps == resumed.outer.scheduler.last_epoch == 5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, r"every_n_steps must be at least 1\. Got 0"),
        ({"warmup_steps": -1}, r"warmup_steps must be at least 0\. Got -1"),
        ({"overhead": 0.0}, r"overhead must be positive\. Got 0\.0"),
        ({"overhead": float("inf")}, r"overhead must be a finite number\. Got inf"),
    ],
)
def test_options_out_of_range(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HypergradientCallback(WeightDecay(), **options)


def test_every_outer_step_looks_at_the_training_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look moves the trust radius, by a factor of 1.5 or 0.5."""
    radii: list[float] = []
    look = Forecast.weights

    def weights(self: Forecast, *args: Any) -> tuple[Tensor, ...]:
        radii.append(self.radius)
        found = look(self, *args)
        radii[-1] = self.radius / radii[-1]
        return found

    monkeypatch.setattr(Forecast, "weights", weights)
    fitted(HypergradientCallback(WeightDecay(), every_n_steps=4, warmup_steps=2))
    assert len(radii) == 4
    assert all(ratio == pytest.approx(1.5) or ratio == pytest.approx(0.5) for ratio in radii)


class Reduced(Regression):
    """A regression whose loss is reduced in another way."""

    def __init__(self, reduction: str) -> None:
        super().__init__(smooth())
        self.reduction = reduction

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.reduction == "unknown":
            return torch.linalg.vector_norm(loss)
        # As of four tokens in each example.
        return loss.expand(8, 4).sum() / 32 if self.reduction == "sum" else loss.expand(8, 4).mean()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("reduction", "terms"), [("sum", 32.0), ("mean", 32.0), ("unknown", None)])
def test_the_loss_and_the_batch_reach_the_statistics(
    reduction: str, terms: float | None, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[float | None], int | None]] = []
    update = KroneckerFisher.update

    def recorded(self: KroneckerFisher, *args: Any, **options: Any) -> None:
        seen.append((self._terms, self._examples))
        update(self, *args, **options)

    monkeypatch.setattr(KroneckerFisher, "update", recorded)
    callback = HypergradientCallback(WeightDecay(), every_n_steps=2, warmup_steps=1, self_check=False)
    loaders = DataLoader(data(64, 1), 8), DataLoader(data(64, 2), 8)
    trainer(callback, accumulate_grad_batches=accumulate).fit(Reduced(reduction), *loaders)
    assert seen
    for found, examples in seen:
        # In an outer step the training loss is evaluated again, but its backward pass comes once.
        assert found == [None if terms is None else pytest.approx(terms)] * accumulate
        assert examples == 8
