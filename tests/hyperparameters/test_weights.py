"""Weights of examples and of parts of a loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_nested.hyperparameters import (
    ExampleWeights,
    Exp,
    Interval,
    LearningRate,
    LossWeights,
    ModuleTensors,
    Softplus,
    WeightDecay,
)


def test_example_weights_follow_the_index_with_their_graph() -> None:
    weights = ExampleWeights(5, init=0.25)
    weights.build({"w": torch.zeros(1, dtype=torch.float64)})
    index = torch.tensor([[4, 0], [4, 2]])
    value = weights(index)
    assert value.shape == (2, 2)
    torch.testing.assert_close(value, torch.full_like(value, 0.25), rtol=1e-14, atol=0)
    (slope,) = torch.autograd.grad(value.sum(), weights.tensors["weights"])
    # σ′ = σ(1 − σ); example 4 appears twice, 1 and 3 not at all.
    expected = torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0], dtype=torch.float64) * 0.25 * 0.75
    torch.testing.assert_close(slope, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("init", [0.5, 1.0, 3.0])
def test_example_weights_can_start_anywhere(init: float) -> None:
    weights = ExampleWeights(3, init=init)
    weights.build({})
    torch.testing.assert_close(weights.values()["weights"], torch.full((3,), init))


def test_loss_weights_sum_the_named_parts() -> None:
    weights = LossWeights(["ce", "aux"], init=[1.0, 0.5])
    weights.build({"w": torch.zeros(1, dtype=torch.float64)})
    ce, aux = torch.tensor(2.0, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    torch.testing.assert_close(weights({"aux": aux, "ce": ce}).detach(), aux, rtol=1e-14, atol=0)  # 1·2 + ½·4
    assert {name: round(float(v), 12) for name, v in weights.values().items()} == {"ce": 1.0, "aux": 0.5}
    (slope,) = torch.autograd.grad(weights({"ce": ce, "aux": aux}), weights.tensors["weights"])
    # softplus′ = 1 − exp(−value)
    expected = torch.tensor([2.0, 4.0]).double() * -torch.expm1(-torch.tensor([1.0, 0.5]).double())
    torch.testing.assert_close(slope, expected, rtol=1e-13, atol=0)
    with pytest.raises(ValueError, match=r"must have the names \['ce', 'aux'\]. Got \['ce'\]"):
        weights({"ce": ce})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExampleWeights(0), "num_examples must be at least 1"),
        (lambda: ExampleWeights(2, init=2.0, transform=Interval()), r"inside \(0.0, 1.0\). Got 2"),
        (lambda: LossWeights("ce"), r"list of strings. Got 'ce'; write \['ce'\]"),
        (lambda: LossWeights(["a", "a"]), "different names"),
        (lambda: LossWeights([]), "different names"),
        (lambda: LossWeights(["a", "b"], init=[1.0]), "one per name"),
        (lambda: LossWeights(["a"], init=float("inf")), "finite"),
        (lambda: LearningRate(0.0), "positive and finite"),
        (lambda: LearningRate().build({}), "call attach"),
        (lambda: ModuleTensors("a").build({}), "attach"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_loss_weight_of_zero_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"positive\. Got 0"):
        LossWeights(["a"], init=0.0, transform=Softplus())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, -1]), r"lie in \[0, 4\).*Got -1"),
        (torch.tensor([4, 0]), "Got 4; num_examples"),
        (torch.tensor([0.5]), "integers. Got torch.float32"),
        (torch.tensor([True]), "integers. Got torch.bool"),
        ({}, "integers. Got dict"),
    ],
)
def test_indices_that_are_no_examples(index: Any, message: str) -> None:
    weights = ExampleWeights(4)
    weights.build({})
    assert weights(torch.tensor([[3, 0]])).shape == (1, 2)
    assert weights(torch.tensor([], dtype=torch.int64)).shape == (0,)
    with pytest.raises(ValueError, match=message):
        weights(index)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExampleWeights(2, init=1 - 1e-5),
        lambda: WeightDecay(init=1e-4, transform=Exp(lower=1e-3)),
        lambda: LossWeights(["a", "b"], init=[0.5, 0.9999], transform=Interval()),
        lambda: LearningRate(init=1e-4, transform=Exp(lower=1e-3)),
    ],
)
def test_a_start_that_the_first_step_would_move_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="start must lie inside the bounds of its transform"):
        make()
