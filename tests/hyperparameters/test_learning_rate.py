"""Learning rates of an optimizer's groups."""

from __future__ import annotations

from lightning_nested.hyperparameters import (
    LearningRate,
)


def test_learning_rates_of_groups() -> None:
    rate = LearningRate()
    rate.attach([0.1, 0.01])
    rate.build({})
    assert [round(r.item(), 6) for r in rate.rates()] == [0.1, 0.01]
    fixed = LearningRate(init=0.5)
    fixed.attach([0.1, 0.01])
    fixed.build({})
    assert [round(r.item(), 6) for r in fixed.rates()] == [0.5, 0.5]
