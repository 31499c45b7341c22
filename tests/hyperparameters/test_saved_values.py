"""Saved hyperparameters keep their meaning under other settings, or are refused by name."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nested.hyperparameters import (
    Categorical,
    Cutout,
    DropoutRates,
    ExampleWeights,
    Exp,
    Hyperparameter,
    Integer,
    Interval,
    LabelSmoothing,
    LossWeights,
    ModuleTensors,
    OuterStep,
    Scalar,
    Simplex,
    Softplus,
    WeightDecay,
    tuned_values,
)
from lightning_nested.hyperparameters.saved_values import saved_values
from tests.cases import DOUBLE

PARAMETERS = {name: torch.ones(2, 3, dtype=DOUBLE, requires_grad=True) for name in ("a.w", "b.w")}
HALF = {"a.w": PARAMETERS["a.w"]}


def adam(tensors: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(tensors, lr=0.1)


def exponential(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def stepped(*hyperparameters: Hyperparameter, parameters: Any = PARAMETERS, **options: Any) -> OuterStep:
    """Return outer steps whose hyperparameters have moved three times, each entry by another amount."""
    outer = OuterStep(list(hyperparameters), **{"optimizer": adam, **options})
    outer.build(parameters, "cpu")
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        outer.hold([torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outer.tensors], 1.0)
        outer.apply()
    return outer


def saved(outer: OuterStep) -> dict[str, Any]:
    """Return the state as a checkpoint holds it."""
    file = io.BytesIO()
    torch.save(outer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def loaded(
    state: Any, *hyperparameters: Hyperparameter, parameters: Any = PARAMETERS, **options: Any
) -> tuple[OuterStep, list[str]]:
    outer = OuterStep(list(hyperparameters), **{"optimizer": adam, **options})
    outer.build(parameters, "cpu")
    return outer, outer.load_state_dict(state, parameters)


def dropout(**options: Any) -> DropoutRates:
    rates = DropoutRates(**options)
    rates.install(nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.4)))
    return rates


KINDS: dict[str, tuple[Callable[[], Hyperparameter], Callable[[], Hyperparameter]]] = {
    "smoothing": (lambda: LabelSmoothing(upper=0.3), lambda: LabelSmoothing(upper=0.9)),
    "examples": (lambda: ExampleWeights(9, init=0.5), lambda: ExampleWeights(9, init=2.0)),
    "decay": (lambda: WeightDecay(init=1e-2), lambda: WeightDecay(init=1e-2, transform=Softplus())),
    "decays": (lambda: WeightDecay("parameter"), lambda: WeightDecay("parameter", transform=Softplus())),
    "losses": (lambda: LossWeights(["a", "b"]), lambda: LossWeights(["b", "a"], transform=Exp())),
    "simplex": (
        lambda: LossWeights(["a", "b"], 0.5, Simplex()),
        lambda: LossWeights(["a", "b"], 0.5, Softplus()),
    ),
    "number": (lambda: Scalar("x", 0.4), lambda: Scalar("x", 0.3, Interval(lower=-1, upper=2))),
    "whole": (lambda: Integer("n", 0, 9, 4), lambda: Integer("n", -5, 20, 7)),
    "holes": (lambda: Cutout(6, 2), lambda: Cutout(6, 2, max_length=30, max_holes=9)),
    "rates": (lambda: dropout(upper=0.9), lambda: dropout(upper=0.95)),
}


@pytest.mark.parametrize("name", KINDS)
def test_another_range_or_transform_keeps_the_values_and_says_so(name: str) -> None:
    before, now = KINDS[name]
    outer = stepped(before())
    other, messages = loaded(saved(outer), now())
    values = outer.values()
    assert values.keys() == other.values().keys()
    for key, value in values.items():
        torch.testing.assert_close(other.values()[key], value, rtol=1e-12, atol=1e-15)
    assert len(messages) == 1
    assert "another range or transform" in messages[0]
    # The moments were those of other unconstrained tensors.
    assert not other.optimizer.state
    other.hold([torch.zeros_like(t) for t in other.tensors], 1.0)
    other.apply()
    for key, value in values.items():
        torch.testing.assert_close(other.values()[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_settings_restore_every_bit(name: str) -> None:
    outer = stepped(KINDS[name][0]())
    other, messages = loaded(saved(outer), KINDS[name][0]())
    assert messages == []
    assert all(torch.equal(a, b) for a, b in zip(outer.tensors, other.tensors, strict=True))
    torch.testing.assert_close(outer.optimizer.state_dict(), other.optimizer.state_dict(), rtol=0.0, atol=0.0)


def test_the_ends_of_an_interval_are_kept_to_its_resolution() -> None:
    """A decided example's weight lies outside the projected part of a wider interval."""
    outer = stepped(ExampleWeights(3))
    with torch.no_grad():
        outer.tensors[0].fill_(-8.0)
    other, _ = loaded(saved(outer), ExampleWeights(3, init=2.0))
    assert float(other.values()["example_weights"].max()) < 4 * 3.4e-4


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            LabelSmoothing(0.4),
            LabelSmoothing(upper=0.1),
            r"label_smoothing must lie in the range of Interval",
        ),
        (WeightDecay(), WeightDecay(transform=Exp(lower=0.1, upper=1), init=0.2), "would move to 0.1; widen"),
        (Integer("n", 0, 9, 8), Integer("n", 0, 4, 2), "n must lie in the range"),
        (WeightDecay(), WeightDecay("model"), "weight_decay must have per='model'. Got per='tensor'"),
        (dropout(), dropout(per="model"), "per='model'. Got per='layer'"),
        (Scalar("x", 1.0), Integer("x", 0, 3, 1), "x must have class='Integer'. Got class='Scalar'"),
        (Categorical("c", ["p", "q"]), Categorical("c", ["q", "p"]), "c must have options="),
        (ExampleWeights(4), ExampleWeights(5), r"must have shape \(5,\)\. Got \(4,\)"),
        (LossWeights(["a", "b"]), LossWeights(["a", "c"]), "must have the entries"),
        (Scalar("x", 1.0), Scalar("y", 1.0), "written with others"),
    ],
)
def test_what_has_no_meaning_here_is_refused(
    before: Hyperparameter, now: Hyperparameter, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loaded(saved(stepped(before)), copy.deepcopy(now))


def test_another_optimizer_or_scheduler_starts_again_and_says_so() -> None:
    state = saved(stepped(WeightDecay(), scheduler=exponential))
    for options, message, rate in (
        ({"optimizer": lambda t: torch.optim.SGD(t, lr=0.3, momentum=0.9)}, "is SGD, and was Adam", 0.3),
        ({"optimizer": lambda t: torch.optim.AdamW(t, lr=0.3), "scheduler": exponential}, "is AdamW", 0.3),
        ({}, "scheduler is None, and was ExponentialLR", 0.1),
        (
            {"scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=9)},
            "scheduler is OneCycleLR",
            0.2 / 25,
        ),
    ):
        outer, messages = loaded(state, WeightDecay(), **options)
        assert message in messages[0]
        assert outer.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        outer.hold([torch.ones_like(t) for t in outer.tensors], 1.0)
        outer.apply()
    state = saved(stepped(WeightDecay()))
    outer, messages = loaded(state, WeightDecay(), optimizer=lambda t: torch.optim.Adam(t, lr=0.2))
    assert outer.optimizer.param_groups[0]["lr"] == 0.1
    assert "lr=0.1 instead of lr=0.2" in messages[0]
    each = lambda tensors: torch.optim.Adam([{"params": [t]} for t in tensors], lr=0.1)  # noqa: E731
    _, messages = loaded(saved(stepped(WeightDecay("parameter"))), WeightDecay("parameter"), optimizer=each)
    assert "other groups" in messages[0]


def test_hyperparameters_in_another_order_keep_their_moments() -> None:
    def pair() -> list[Hyperparameter]:
        return [Scalar("x", 1.0), Scalar("y", 2.0)]

    first = stepped(*pair())
    other, messages = loaded(saved(first), *reversed(pair()))
    assert messages == []
    for outer in (first, other):
        outer.hold([torch.ones_like(t) for t in outer.tensors], 1.0)
        outer.apply()
    assert first.values() == other.values()


@pytest.mark.parametrize("per", ["tensor", "parameter", "model"])
def test_frozen_parameters_get_their_decays_and_moments_when_they_come_back(per: Any) -> None:
    outer = stepped(WeightDecay(per))
    other, messages = loaded(saved(outer), WeightDecay(per), parameters=HALF)
    assert messages == []
    assert not other.is_built_for(HALF)
    other.build(PARAMETERS, "cpu")
    for twin in (outer, other):
        twin.hold([torch.ones_like(t) for t in twin.tensors], 1.0)
        twin.apply()
    assert outer.values().keys() == other.values().keys()
    assert all(torch.equal(value, other.values()[key]) for key, value in outer.values().items())


@pytest.mark.parametrize("per", ["tensor", "parameter"])
def test_decays_of_a_layer_that_stays_frozen_wait_for_it(per: Any) -> None:
    outer = stepped(WeightDecay(per))
    other, _ = loaded(saved(outer), WeightDecay(per), parameters=HALF)
    other.build(HALF, "cpu")
    assert list(other.values()) == ["weight_decay"]
    other.hold([torch.zeros_like(t) for t in other.tensors], 1.0)
    other.build(PARAMETERS, "cpu")
    assert torch.equal(other.values()["weight_decay/b.w"], outer.values()["weight_decay/b.w"])


def test_parameters_of_another_model_are_refused() -> None:
    state = saved(stepped(WeightDecay("model")))
    for parameters in ({"c": torch.ones(2)}, {"a.w": torch.ones(5)}):
        with pytest.raises(ValueError, match="must belong to this model"):
            loaded(state, WeightDecay("model"), parameters=parameters)


def test_missing_keys_and_later_versions_are_named() -> None:
    state = saved(stepped(WeightDecay()))
    for key in ("hyperparameters", "kinds", "values", "optimizer", "scheduler", "solver"):
        with pytest.raises(ValueError, match=f"must have '{key}'"):
            loaded({k: v for k, v in state.items() if k != key}, WeightDecay())
    for part in ("kinds", "values"):
        with pytest.raises(ValueError, match=f"the hyperparameters' {part} must have 'weight_decay'"):
            loaded({**state, part: {}}, WeightDecay())
    with pytest.raises(ValueError, match=r"state of weight_decay must have 'a\.w', 'b\.w'"):
        loaded({**state, "values": {"weight_decay": {}}}, WeightDecay())
    with pytest.raises(ValueError, match="update it"):
        loaded({**state, "version": 99}, WeightDecay())


def test_a_state_of_an_earlier_version_loads_with_a_warning() -> None:
    """It had unconstrained tensors alone."""
    outer = stepped(WeightDecay())
    state = {
        k: v for k, v in saved(outer).items() if k in ("hyperparameters", "optimizer", "scheduler", "solver")
    }
    other, messages = loaded(state, WeightDecay())
    assert torch.equal(other.tensors[0], outer.tensors[0])
    assert "earlier version" in messages[0]
    _, messages = loaded(state, WeightDecay(), optimizer=lambda t: torch.optim.SGD(t, lr=0.3))
    assert "was of another class" in messages[1]
    with pytest.raises(ValueError, match="one of an earlier version"):
        saved_values(state)


def test_values_of_a_module_are_in_the_file_once() -> None:
    tensors = ModuleTensors("0")
    tensors.attach(nn.Sequential(nn.Linear(100, 100)))
    state = stepped(tensors).state_dict()
    raw, value = state["hyperparameters"]["0"]["weight"], state["values"]["0"]["weight"]
    assert value is raw


def test_tuned_values_reads_callbacks_and_modules(tmp_path: Any) -> None:
    outer = stepped(WeightDecay(), Scalar("x", 2.0))
    for checkpoint in (
        {"callbacks": {"Other": {"steps": 3}, "HypergradientCallback": {"outer": outer.state_dict()}}},
        {"nested": {"outer": outer.state_dict()}},
        {"hypernetwork": {"outer": outer.state_dict()}},
    ):
        torch.save(checkpoint, tmp_path / "a.ckpt")
        found: dict[str, Tensor] = tuned_values(tmp_path / "a.ckpt")
        assert found == outer.values()
    torch.save({"callbacks": {}, "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt' without any"):
        tuned_values(tmp_path / "a.ckpt")
