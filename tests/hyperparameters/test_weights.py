"""ExampleWeights, LossWeights, ModuleTensors and LearningRate on their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_nested.hyperparameters import (
    ExampleWeights,
    Interval,
    LearningRate,
    LossWeights,
    ModuleTensors,
    Softplus,
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
        (lambda: LossWeights("ce"), "list of different names"),
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
    weights = LossWeights(["a"], init=0.0, transform=Softplus())
    with pytest.raises(ValueError, match=r"positive\. Got 0"):
        weights.build({})


def test_learning_rates_of_groups() -> None:
    rate = LearningRate()
    rate.attach([0.1, 0.01])
    rate.build({})
    assert [round(r.item(), 6) for r in rate.rates()] == [0.1, 0.01]
    fixed = LearningRate(init=0.5)
    fixed.attach([0.1, 0.01])
    fixed.build({})
    assert [round(r.item(), 6) for r in fixed.rates()] == [0.5, 0.5]


class Augmented(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.augmenter = nn.Linear(2, 2)
        self.network = nn.Linear(2, 1)
        self.images = torch.zeros(3, 2)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)


@pytest.mark.parametrize(
    ("path", "names"),
    [("augmenter", ["weight", "bias"]), ("augmenter.weight", ["weight"]), ("images", ["images"])],
)
def test_tensors_are_found_by_their_dotted_name(path: str, names: list[str]) -> None:
    tensors = ModuleTensors(path)
    tensors.attach(Augmented())
    assert list(tensors.tensors) == names
    assert all(t.requires_grad and t.is_leaf for t in tensors.tensors.values())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("augmentor", "'augmentor'; close names: augmenter"),
        ("frozen", "require gradients"),
        ("forward", "leaf tensor"),
    ],
)
def test_names_that_hold_nothing_are_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModuleTensors(path).attach(Augmented())
