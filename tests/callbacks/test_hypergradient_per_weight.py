"""Decays of single weights in a fit with the defaults: the outer data say how far they leave their tensor's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hyperparameters import SharedAdam, WeightDecay
from tests.callbacks.tuned_regression import Regression, data, sgd, smooth
from tests.trainers import trainer


def frequent(**options: Any) -> HypergradientCallback:
    """A decay per weight, with an outer step at every third of these short fits."""
    return HypergradientCallback(WeightDecay("parameter", **options), overhead=10.0, every_n_steps=3)


def fit(
    callback: HypergradientCallback, val: Any = None, *, epochs: int = 3, path: Path | None = None
) -> Any:
    """Fit for eight steps an epoch; three outer batches a round, if none are given."""
    found = trainer(callback, max_epochs=epochs)
    val = DataLoader(data(12, 2), 4) if val is None else val
    found.fit(Regression(smooth()), DataLoader(data(64, 1), 8), val, ckpt_path=path)
    return found


def widths(callback: HypergradientCallback) -> list[float]:
    """Return the largest relative deviation of each tensor's decays."""
    return [float((v / v.mean() - 1).abs().max()) for v in callback.values().values()]


def batches(callback: HypergradientCallback) -> int | None:
    assert isinstance(callback.outer.optimizer, SharedAdam)
    return callback.outer.optimizer.batches


def test_a_shrink_of_one_is_a_decay_per_tensor() -> None:
    alone, tensors = (
        frequent(shrink=1.0),
        HypergradientCallback(WeightDecay(), overhead=10.0, every_n_steps=3),
    )
    fit(alone)
    fit(tensors)
    assert max(widths(alone)) < 1e-12
    for a, b in zip(alone.values().values(), tensors.values().values(), strict=True):
        torch.testing.assert_close(a, b.expand_as(a), rtol=1e-10, atol=0)


def test_a_shrink_of_zero_lets_every_weight_go() -> None:
    callback = frequent(shrink=0.0)
    fit(callback)
    assert min(widths(callback)) > 0.1


class Stream(IterableDataset[Any]):
    """Examples without a length."""

    def __iter__(self) -> Any:
        return iter(data(12, 2))


def test_batches_of_a_round_are_those_of_the_outer_data(tmp_path: Path) -> None:
    callback = frequent()
    found = fit(callback)
    assert batches(callback) == 3
    found.save_checkpoint(tmp_path / "three.ckpt")
    # In a second fit, and in one that is resumed, from their own data.
    fit(callback, DataLoader(data(12, 2), 6))
    assert batches(callback) == 2
    resumed = frequent()
    fit(resumed, DataLoader(data(12, 2), 2), epochs=4, path=tmp_path / "three.ckpt")
    assert batches(resumed) == 6
    stream = frequent()
    fit(stream, DataLoader(Stream(), 4))
    assert batches(stream) is None


def test_one_batch_a_round_keeps_the_decays_of_a_tensor_together() -> None:
    callback = frequent()
    fit(callback, DataLoader(data(12, 2), 12))
    assert callback.outer_steps > 5
    assert max(widths(callback)) < 1e-12


@pytest.mark.filterwarnings("ignore:.*starts again, without memory")
def test_a_checkpoint_of_a_plain_adam_keeps_its_decays(tmp_path: Path) -> None:
    """Earlier versions moved every weight's decay by Adam alone."""
    callback = frequent()
    callback.plan._default_optimizer = False
    fit(callback).save_checkpoint(tmp_path / "adam.ckpt")
    assert type(callback.outer.optimizer) is torch.optim.Adam
    resumed = frequent()
    with pytest.warns(UserWarning, match="is SharedAdam, and was Adam in the checkpoint"):
        fit(resumed, epochs=3, path=tmp_path / "adam.ckpt")
    for a, b in zip(callback.values().values(), resumed.values().values(), strict=True):
        assert torch.equal(a, b)


def test_copies_go_on_by_themselves() -> None:
    callback = frequent(shrink=0.0)
    fit(callback)
    before = callback.values()
    clone = copy.deepcopy(callback)
    fit(clone)
    assert isinstance(clone.outer.optimizer, SharedAdam)
    for name, value in callback.values().items():
        assert torch.equal(value, before[name])
        assert not torch.equal(value, clone.values()[name])


def test_another_optimizer_does_not_shrink() -> None:
    with pytest.raises(ValueError, match=r"shrink=0\.5, and another outer optimizer"):
        HypergradientCallback(WeightDecay("parameter", shrink=0.5), optimizer=sgd(1.0))
    HypergradientCallback(WeightDecay("parameter"), optimizer=sgd(1.0))


def test_shared_adam_with_a_rate_of_ones_own() -> None:
    """It knows the outer data as well."""
    callback = HypergradientCallback(
        WeightDecay("parameter"),
        optimizer=lambda tensors: SharedAdam(tensors, lr=0.5),
        overhead=10.0,
        every_n_steps=3,
    )
    fit(callback, DataLoader(data(12, 2), 12))
    assert batches(callback) == 1
    assert max(widths(callback)) < 1e-12
