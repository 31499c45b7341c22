"""WeightDecay: every closed form against autograd of the written-out penalty."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nested.hyperparameters import WeightDecay
from tests.conftest import Normal

PER = ["model", "tensor", "parameter"]


@pytest.fixture
def parameters(normal: Normal) -> dict[str, Tensor]:
    names = {"a.weight": (3, 2), "a.bias": (3,), "norm.weight": (3,), "b.weight": (1, 3)}
    return {name: normal(*shape).requires_grad_(True) for name, shape in names.items()}


def spread(decay: WeightDecay, normal: Normal) -> None:
    """Different decays, so that a mix-up of entries shows."""
    with torch.no_grad():
        for raw in decay.tensors.values():
            raw.add_(normal(*raw.shape))


@pytest.mark.parametrize("per", PER)
def test_gradient_curvature_and_mixed_derivative_are_autograds(
    per: Any, parameters: dict[str, Tensor], normal: Normal
) -> None:
    decay = WeightDecay(per, init=0.3, include=["*"], exclude=["norm.*"])
    decay.build(parameters)
    spread(decay, normal)
    weights, raws = tuple(parameters.values()), tuple(decay.tensors.values())
    v = tuple(normal(*p.shape) for p in weights)

    gradient = torch.autograd.grad(
        decay.penalty(parameters), weights, create_graph=True, allow_unused=True, materialize_grads=True
    )
    product = torch.autograd.grad(
        gradient, weights, v, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    mixed = torch.autograd.grad(gradient, raws, v)

    for p in weights:
        p.grad = torch.zeros_like(p)
    decay.add_gradient_(parameters)
    linearized = decay.linearize(parameters)
    # Each entry is one product of the same numbers; sums over a tensor differ by their order alone.
    for p, expected in zip(weights, gradient, strict=True):
        torch.testing.assert_close(p.grad, expected.detach(), rtol=1e-14, atol=0)
    for got, expected in zip(linearized.curvature() @ v, product, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    for got, expected in zip(linearized.mixed(v), mixed, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("per", "shapes"), [("model", [()]), ("tensor", [(4,)]), ("parameter", None)])
def test_sizes_and_names(per: Any, shapes: Any, parameters: dict[str, Tensor]) -> None:
    decay = WeightDecay(per, init=1e-3, include=["*"])
    assert not decay.built
    decay.build(parameters)
    assert decay.built
    expected = shapes if shapes is not None else [p.shape for p in parameters.values()]
    assert [tuple(t.shape) for t in decay.tensors.values()] == [tuple(s) for s in expected]
    assert list(decay.values()) == (["model"] if per == "model" else list(parameters))
    for value in decay.values().values():
        torch.testing.assert_close(value, torch.full_like(value, 1e-3), rtol=1e-12, atol=0)


def test_include_and_exclude_choose_by_name(parameters: dict[str, Tensor]) -> None:
    decay = WeightDecay("tensor", include=["*.weight"], exclude=["norm.*"])
    decay.build(parameters)
    assert decay.parameter_names == ("a.weight", "b.weight")
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    decay.add_gradient_(parameters)
    assert not parameters["a.bias"].grad.any()  # type: ignore[union-attr]
    assert parameters["b.weight"].grad.all()  # type: ignore[union-attr]


def test_a_parameter_without_gradient_gets_none(parameters: dict[str, Tensor]) -> None:
    decay = WeightDecay("model")
    decay.build(parameters)
    decay.add_gradient_(parameters)
    assert all(p.grad is None for p in parameters.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightDecay("layer"), "per must be"),  # type: ignore[arg-type]
        (lambda: WeightDecay(init=0.0), "positive and finite. Got 0.0"),
        (lambda: WeightDecay(init=float("nan")), "finite number or None. Got nan"),
        (lambda: WeightDecay(include="a.weight"), r"write \['a.weight'\]"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_patterns_that_match_nothing_name_close_ones(parameters: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"'a\.wieght', which matches none; close names: a\.weight"):
        WeightDecay(include=["a.wieght"]).build(parameters)
    with pytest.raises(ValueError, match="leaves none of 4"):
        WeightDecay(exclude=["*"]).build(parameters)


def test_bounds_admit_a_start_outside_the_default_range(parameters: dict[str, Tensor]) -> None:
    for init in (1e-30, 50.0):
        decay = WeightDecay("model", init=init)
        decay.build(parameters)
        decay.project_()
        assert float(decay.values()["model"]) == pytest.approx(init, rel=1e-12)


def test_copies_and_saved_states_hold_the_values(parameters: dict[str, Tensor], normal: Normal) -> None:
    decay = WeightDecay("parameter", init=0.1)
    decay.build(parameters)
    spread(decay, normal)
    for twin in (copy.deepcopy(decay), pickle.loads(pickle.dumps(decay))):
        for key, raw in twin.tensors.items():
            assert torch.equal(raw, decay.tensors[key])
            assert raw.requires_grad
            assert raw is not decay.tensors[key]
    other = WeightDecay("parameter", init=0.1)
    other.build(parameters)
    other.load_state_dict(decay.state_dict())
    assert all(torch.equal(other.tensors[k], decay.tensors[k]) for k in decay.tensors)
    with pytest.raises(ValueError, match="must have the tensors"):
        other.load_state_dict({"model": torch.zeros(())})
    wrong = {key: torch.zeros(9) for key in decay.tensors}
    with pytest.raises(ValueError, match=r"must have shape \(3, 2\). Got \(9,\)"):
        other.load_state_dict(wrong)


def test_a_decay_for_each_input_column_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"Got 'feature'; for a decay of each input column take FeatureDecay"
    ):
        WeightDecay(per="feature")  # type: ignore[arg-type]
