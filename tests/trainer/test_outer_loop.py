"""Counters, logging, restarts and checkpoints of outer steps, without a training run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hyperparameters import OuterReport, OuterStep, WeightDecay
from lightning_nested.trainer.outer_loop import OuterLoop
from lightning_nested.trainer.restart import reinitialize
from tests.trainers import trainer


class Linear(LightningModule):
    """A module that records what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.logged: list[dict[str, float]] = []

    def log_dict(self, metrics: Any, **_: Any) -> None:  # type: ignore[override]
        self.logged.append(dict(metrics))


def outer_loop(decay: WeightDecay | None = None, **options: Any) -> tuple[OuterLoop, Linear]:
    """Return a loop that tunes one decay of a linear layer, or the one given, and its module."""
    module = Linear()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module.trainer = trainer()
    module.trainer.strategy.optimizers = [optimizer]
    outer = OuterStep(
        [decay or WeightDecay("model", init=0.1)], optimizer=lambda tensors: torch.optim.SGD(tensors, lr=1.0)
    )
    loop = OuterLoop("Owner", outer, **options)
    loop.build(dict(module.named_parameters()), torch.device("cpu"))
    return loop, module


def hold(loop: OuterLoop) -> OuterReport:
    report = loop.outer.hold([torch.ones_like(t) for t in loop.outer.tensors], 2.0)
    loop.keep(report)
    return report


def test_a_step_moves_counts_and_logs() -> None:
    loop, module = outer_loop(log_every_n_outer_steps=2)
    before = float(loop.outer.values()["weight_decay"])
    for _ in range(3):
        report = hold(loop)
        loop.step(module)
    assert loop.outer_steps == 3
    assert loop.last_report is report
    assert float(loop.outer.values()["weight_decay"]) < before
    # Steps 1 and 3 of 3.
    assert len(module.logged) == 2
    assert module.logged[0]["hypergradient/outer_loss"] == 2.0
    assert module.logged[0]["hypergradient/skipped_steps"] == 0.0
    assert module.logged[1]["hyperparameters/weight_decay"] == float(loop.outer.values()["weight_decay"])


def test_no_step_is_logged_at_zero() -> None:
    loop, module = outer_loop(log_every_n_outer_steps=0)
    hold(loop)
    loop.step(module)
    assert module.logged == []
    assert module.trainer.progress_bar_metrics == {}


def test_the_progress_bar_shows_logged_steps() -> None:
    loop, module = outer_loop(log_every_n_outer_steps=2)
    decays = []
    for loss in (4.0, 3.0, 2.0, 1.0):
        loop.keep(loop.outer.hold([torch.ones_like(t) for t in loop.outer.tensors], loss))
        loop.step(module)
        decays.append(float(loop.outer.values()["weight_decay"]))
        shown = module.trainer.progress_bar_metrics
        # Steps 1 and 3.
        at = 0 if loop.outer_steps < 3 else 2
        assert shown == {"outer_loss": (4.0, 3.0, 2.0)[at], "weight_decay": decays[at]}


def test_the_progress_bar_shows_the_mean_of_many_values() -> None:
    loop, module = outer_loop(decay=WeightDecay("parameter", init=0.1))
    hold(loop)
    loop.step(module)
    mean = torch.cat([d.detach().flatten() for d in loop.outer.decays[0].decays().values()]).mean()
    assert module.trainer.progress_bar_metrics["weight_decay/mean"] == pytest.approx(float(mean), rel=1e-6)


def test_the_summary_compares_the_first_outer_losses_with_the_last() -> None:
    """Means of five, or of fewer where steps would count twice; a resumed run compares with the very first."""
    loop, _ = outer_loop()
    assert "outer loss" not in loop.summary()
    with torch.no_grad():
        loop.outer.tensors[0].add_(1.0)
    for loss in (8.0, 6.0, 4.0):
        loop.keep(OuterReport(outer_loss=loss, hypergradient_norm=1.0))
    few = "outer loss: 8 → 4 (means of the first and last 1 outer steps), improved: 3 outer steps are few to judge by"
    assert loop.summary().endswith(few)
    for loss in (3.0, 2.0, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0):
        loop.keep(OuterReport(outer_loss=loss, hypergradient_norm=1.0))
    expected = "outer loss: 4.6 → 1 (means of the first and last 5 outer steps), improved"
    assert loop.summary().endswith(expected)
    resumed, _ = outer_loop()
    resumed.load_state_dict(loop.state_dict())
    assert resumed.summary().endswith(expected)
    for _ in range(5):
        resumed.keep(OuterReport(outer_loss=4.6, hypergradient_norm=1.0))
    assert resumed.summary().endswith("4.6 → 4.6 (means of the first and last 5 outer steps), not improved")
    resumed.reset()
    assert "outer loss" not in resumed.summary()


def test_the_summary_calls_nothing_improved_where_no_value_moved() -> None:
    loop, _ = outer_loop()
    for loss in (8.0, 4.0):
        loop.keep(OuterReport(outer_loss=loss, hypergradient_norm=0.0))
    expected = "outer loss: 8 → 4 (means of the first and last 1 outer steps)"
    assert loop.summary().endswith(f"{expected}, but no value moved")
    with torch.no_grad():
        loop.outer.tensors[0].add_(1.0)
    assert f"{expected}, improved" in loop.summary()


def test_a_state_of_an_earlier_version_has_no_losses() -> None:
    loop, _ = outer_loop()
    hold(loop)
    state = loop.state_dict()
    del state["outer"]["losses"]
    loop.load_state_dict(state)
    assert loop.outer.trend.count == 1


def test_outer_steps_are_due_after_the_warmup() -> None:
    loop, _ = outer_loop(every_n_steps=3, warmup_steps=2)
    assert [step for step in range(10) if loop.is_due(step)] == [2, 5, 8]


def test_skipped_steps_are_counted_and_limited_in_a_row() -> None:
    loop, _ = outer_loop(max_skipped=2)
    error = FloatingPointError("not finite")
    with pytest.warns(UserWarning, match="Owner skipped the outer step at inner step 0: not finite"):
        loop.skip(error)
    loop.skip(error)
    hold(loop)
    assert (loop.skipped_steps, loop.skipped_in_a_row) == (2, 0)
    with pytest.warns(UserWarning, match="skipped"):
        loop.skip(error)
    loop.skip(error)
    with pytest.raises(FloatingPointError, match=r"max_skipped=2 .* Got at last: not finite"):
        loop.skip(error)


def test_a_restart_draws_the_same_weights_again_and_clears_the_optimizer() -> None:
    loop, module = outer_loop(restart_every=2)
    (optimizer,) = module.trainer.optimizers
    loop.batches = SimpleNamespace(seed=7)  # type: ignore[assignment]
    module.layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    moved = module.layer.weight.detach().clone()
    hold(loop)
    loop.step(module)
    assert torch.equal(module.layer.weight, moved)
    hold(loop)
    loop.step(module)
    assert not torch.equal(module.layer.weight, moved)
    assert not optimizer.state
    again = nn.Linear(2, 1)
    reinitialize(again, dict(again.named_parameters()), dict(again.named_parameters()), 7 + 2 * 104_729)
    assert torch.equal(module.layer.weight, again.weight)


def test_a_state_restores_values_counters_initial_weights_and_position() -> None:
    loop, module = outer_loop(restart_every=5)
    hold(loop)
    loop.step(module)
    loop.inner_steps = 4
    position = {"seed": 1, "round": 2, "position": 3}
    state = {**loop.state_dict(), "initial": loop.initial, "batches": position}
    assert set(state) == {
        "outer",
        "batches",
        "trace",
        "inner_steps",
        "outer_steps",
        "skipped_steps",
        "skipped_in_a_row",
        "initial",
    }
    other, _ = outer_loop(restart_every=5)
    other.load_state_dict(state)
    assert (other.inner_steps, other.outer_steps) == (4, 1)
    assert torch.equal(other.outer.values()["weight_decay"], loop.outer.values()["weight_decay"])
    assert torch.equal(other.initial["layer.weight"], loop.initial["layer.weight"])
    assert other.trace.steps == loop.trace.steps == [1]
    # The position waits for the stream of batches.
    assert other.state_dict()["batches"] == position


def test_a_reset_forgets_everything() -> None:
    loop, module = outer_loop()
    hold(loop)
    loop.step(module)
    loop.inner_steps = 4
    loop.reset()
    assert (loop.inner_steps, loop.outer_steps, loop.parameters) == (0, 0, {})
    assert not loop.outer.tensors


def test_unfrozen_parameters_are_noticed_and_remembered() -> None:
    loop, module = outer_loop(restart_every=1)
    (optimizer,) = module.trainer.optimizers
    assert loop.is_built_for(optimizer)
    added = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [added]})
    assert not loop.is_built_for(optimizer)
    loop.build({**loop.parameters, "added": added}, torch.device("cpu"))
    assert loop.is_built_for(optimizer)
    assert torch.equal(loop.initial["added"], torch.ones(3))


@pytest.mark.parametrize("name", ["every_n_steps", "restart_every"])
def test_counts_that_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at least 1\. Got 0"):
        outer_loop(**{name: 0})


@pytest.mark.parametrize("name", ["warmup_steps", "max_skipped", "log_every_n_outer_steps"])
def test_counts_that_must_not_be_negative(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at least 0\. Got -1"):
        outer_loop(**{name: -1})


def test_no_count_is_let_pass() -> None:
    outer_loop(restart_every=None)


def test_owners_have_the_attributes_of_their_loop() -> None:
    callback = HypergradientCallback(WeightDecay(), every_n_steps=3)
    assert (callback.every_n_steps, callback.outer_steps, callback.last_report) == (3, 0, None)
    callback.every_n_steps = 2
    callback.outer_loop.outer_steps = 5
    assert (callback.outer_loop.every_n_steps, callback.outer_steps) == (2, 5)


class Stream:
    """Stands for the batches of a fit."""

    def __init__(self, position: int) -> None:
        self.position = {"seed": 0, "round": 0, "position": position}

    def state_dict(self) -> dict[str, int]:
        return self.position

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise AssertionError("a stream of a fit that failed must not be read")


def test_a_new_fit_ends_the_stream_of_one_that_failed() -> None:
    loop, _ = outer_loop()
    state = {**loop.state_dict(), "batches": Stream(3).position}
    loop.batches = Stream(1)  # type: ignore[assignment]
    loop.prepare()
    loop.load_state_dict(state)
    assert loop.batches is None
    assert loop.state_dict()["batches"] == Stream(3).position
