"""WeightDecay.fit_to_run: units of the run, starts and bounds; which parameters are decayed by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nested.hyperparameters import Exp, WeightDecay
from lightning_nested.hyperparameters.weight_decay import _LARGEST, _SMALLEST, _START
from tests.cases import DOUBLE
from tests.conftest import Normal

UNITS = {"a.weight": 1e-3, "a.bias": 7.0, "b.weight": 4e-3}


@pytest.fixture
def parameters(normal: Normal) -> dict[str, Tensor]:
    shapes = {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (1, 3)}
    return {name: normal(*shape).requires_grad_(True) for name, shape in shapes.items()}


def fitted(per: Any, parameters: dict[str, Tensor], steps: float = 1000, **options: Any) -> WeightDecay:
    decay = WeightDecay(per, **options)
    decay.build(parameters)
    decay.fit_to_run(UNITS, steps, restart=True)
    return decay


@pytest.mark.parametrize("per", ["model", "tensor", "parameter"])
def test_decays_start_at_a_few_units_and_stay_within_their_bounds(
    per: Any, parameters: dict[str, Tensor]
) -> None:
    # One decay for all has the geometric mean of the units, 2e-3.
    units = {"model": 2e-3} if per == "model" else {"a.weight": 1e-3, "b.weight": 4e-3}
    decay = fitted(per, parameters)
    for factor, amount in ((1.0, _START), (1e-9, _SMALLEST), (1e9, _LARGEST)):
        for raw in decay.tensors.values():
            with torch.no_grad():
                raw.add_(torch.tensor(factor).log())
        decay.project_()
        found = decay.values()
        assert found.keys() == units.keys()
        for name, unit in units.items():
            torch.testing.assert_close(
                found[name], torch.full_like(found[name], amount * unit), rtol=1e-12, atol=0
            )


def test_decays_of_short_runs_stay_stable(parameters: dict[str, Tensor]) -> None:
    """Ten units in a hundred steps: no step shrinks a weight by more than a tenth."""
    decay = fitted("tensor", parameters, steps=100)
    with torch.no_grad():
        decay.tensors["tensor"].add_(50.0)
    decay.project_()
    assert decay.values()["a.weight"].item() == pytest.approx(10 * 1e-3)
    assert fitted("tensor", parameters, steps=20).values()["a.weight"].item() == pytest.approx(2 * 1e-3)


@pytest.mark.parametrize(
    ("passes", "units"), [(0.01, 0.1), (1.0, 0.3), (5.0, 1.5), (10.0, 3.0), (400.0, 3.0)]
)
def test_runs_of_few_passes_start_lower(passes: float, units: float, parameters: dict[str, Tensor]) -> None:
    decay = WeightDecay()
    decay.build(parameters)
    decay.fit_to_run({"a.weight": 1e-3, "b.weight": 4e-3}, 1000, passes=passes, restart=True)
    assert decay.values()["a.weight"].item() == pytest.approx(units * 1e-3)
    # A layer that comes later starts as the others did.
    decay.build({"new": torch.ones(4, 4, dtype=DOUBLE), **parameters})
    assert decay.values()["new"].item() == pytest.approx(units * 2e-3)


def test_a_start_that_was_far_too_large_is_named(parameters: dict[str, Tensor]) -> None:
    decay = fitted("tensor", parameters)
    assert decay.advice(3e-3, 6.1e-4) is None
    assert "WeightDecay(init=0.0006)" in (decay.advice(3e-3, 5.9e-4) or "")
    # One epoch starts at 0.3 units, and cannot end below 0.1.
    decay.fit_to_run(UNITS, 1000, passes=1.0, restart=True)
    assert decay.advice(3e-4, 1.3e-4) is None
    assert "WeightDecay(init=0.0001)" in (decay.advice(3e-4, 1e-4) or "")
    # The least start is at the floor.
    decay.fit_to_run(UNITS, 1000, passes=0.1, restart=True)
    assert decay.advice(1e-4, 1e-4) is None
    # The user's own start, and one that no run has given, need no word.
    chosen, unfitted = WeightDecay(init=3e-3), WeightDecay()
    for other in (chosen, unfitted):
        other.build(parameters)
        assert other.advice(3e-3, 1e-6) is None


def test_bounds_above_one_are_admitted(parameters: dict[str, Tensor]) -> None:
    decay = WeightDecay()
    decay.build(parameters)
    decay.fit_to_run({"a.weight": 5.0, "b.weight": 2.0}, 1000, restart=True)
    decay.project_()
    assert [v.item() for v in decay.values().values()] == pytest.approx([5 * _START, 2 * _START])


def test_without_a_restart_decays_are_bounded_only(parameters: dict[str, Tensor]) -> None:
    decay = WeightDecay()
    decay.build(parameters)
    decay.fit_to_run(UNITS, 1000, restart=False)
    assert decay.values()["a.weight"].item() == pytest.approx(1e-4)
    with torch.no_grad():
        decay.tensors["tensor"].sub_(5.0)
    decay.project_()
    assert [v.item() for v in decay.values().values()] == pytest.approx([1e-4, 4e-4])


def test_a_transform_of_the_users_keeps_its_range(parameters: dict[str, Tensor]) -> None:
    decay = fitted("tensor", parameters, transform=Exp(lower=1e-6, upper=2e-4))
    decay.project_()
    assert [v.item() for v in decay.values().values()] == pytest.approx([1e-4, 1e-4])


@pytest.mark.parametrize("per", ["tensor", "parameter"])
def test_parameters_that_come_later_start_at_the_mean_unit(per: Any, parameters: dict[str, Tensor]) -> None:
    """A layer that is unfrozen has no unit of its own; those of the others stay as they are."""
    first = {name: parameters[name] for name in ("a.weight", "a.bias", "b.weight")}
    decay = WeightDecay(per)
    decay.build(first)
    decay.fit_to_run({"a.weight": 1e-3, "b.weight": 4e-3}, 1000, restart=True)
    with torch.no_grad():
        for raw in decay.tensors.values():
            raw.add_(0.5)
    before = decay.values()
    more = {"new": torch.ones(4, 4, dtype=DOUBLE), **first}
    decay.build(more)
    found = decay.values()
    for name, value in before.items():
        assert torch.equal(found[name], value)
    torch.testing.assert_close(found["new"], torch.full_like(found["new"], _START * 2e-3), rtol=1e-12, atol=0)
    with torch.no_grad():
        for raw in decay.tensors.values():
            raw.add_(50.0)
    decay.project_()
    assert [v.max().item() for v in decay.values().values()] == pytest.approx(
        [_LARGEST * unit for unit in (2e-3, 1e-3, 4e-3)]
    )
    decay.build({"b.weight": first["b.weight"]})  # and freezing
    decay.project_()
    assert list(decay.values()) == ["b.weight"]


def test_a_reset_forgets_the_run(parameters: dict[str, Tensor]) -> None:
    decay = fitted("tensor", parameters)
    decay.reset()
    decay.build(parameters)
    assert [v.item() for v in decay.values().values()] == pytest.approx([1e-4, 1e-4])


def test_by_default_matrices_are_decayed_and_vectors_where_there_is_nothing_else(
    parameters: dict[str, Tensor],
) -> None:
    decay = WeightDecay()
    decay.build({**parameters, "conv.weight": torch.ones(2, 1, 3, 3)})
    assert decay.parameter_names == ("a.weight", "b.weight", "conv.weight")
    for include, exclude, names in (
        (["*"], [], ("a.weight", "a.bias", "b.weight")),
        (["a.*"], [], ("a.weight", "a.bias")),
        (None, ["a.*"], ("b.weight",)),
        (None, ["*.weight"], ("a.bias",)),
    ):
        decay = WeightDecay(include=include, exclude=exclude)
        decay.build(parameters)
        assert decay.parameter_names == names


@pytest.mark.parametrize("per", ["model", "tensor", "parameter"])
def test_shrinking_is_the_decoupled_decay(per: Any, parameters: dict[str, Tensor], normal: Normal) -> None:
    decay = fitted(per, parameters, include=["*"])
    with torch.no_grad():
        for raw in decay.tensors.values():
            raw.add_(normal(*raw.shape))
    names = list(parameters)
    rates = {id(p): 0.1 * (i + 1) for i, p in enumerate(parameters.values())}
    for name in names[:2]:
        parameters[name].grad = torch.zeros_like(parameters[name])
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for _ in range(2):
        decay.shrink_(parameters, rates)
        with torch.no_grad():
            for raw in decay.tensors.values():
                raw.add_(0.3)  # a change of the decays is seen at the next step
    d = decay.values()
    for i, name in enumerate(names):
        value = d["model"] if per == "model" else d[name]
        factors = [(1 - 0.1 * (i + 1) * value * torch.tensor(s, dtype=DOUBLE).exp()) for s in (-0.6, -0.3)]
        expected = before[name] * factors[0] * factors[1] if i < 2 else before[name]
        torch.testing.assert_close(parameters[name].detach(), expected, rtol=1e-12, atol=1e-15)


def test_linearized_with_factors_is_the_coupled_decay_of_their_product(
    parameters: dict[str, Tensor], normal: Normal
) -> None:
    decay = fitted("parameter", parameters)
    with torch.no_grad():
        for raw in decay.tensors.values():
            raw.add_(normal(*raw.shape))
    factors = {name: normal(*p.shape).exp() for name, p in parameters.items()}
    v = tuple(normal(*p.shape) for p in parameters.values())
    penalty = decay.linearize(parameters, factors)
    w, s, d = parameters["b.weight"].detach(), factors["b.weight"], decay.values()["b.weight"]
    curvature, mixed = penalty.curvature() @ v, penalty.mixed(v)
    torch.testing.assert_close(curvature[2], s * d * v[2], rtol=1e-13, atol=0)
    torch.testing.assert_close(mixed[1], s * d * w * v[2], rtol=1e-13, atol=0)
    assert not curvature[1].any()
