"""Scalars: label smoothing, whole numbers, choices."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_nested.hypergradient import implicit_hypergradient
from lightning_nested.hyperparameters import (
    Brightness,
    Categorical,
    Cutout,
    ExampleWeights,
    GroupWeights,
    Hyperparameter,
    HyperparameterVector,
    Integer,
    LabelSmoothing,
    LossWeights,
    Scalar,
    WeightNetwork,
)
from tests.hyperparameters.built import built


@pytest.mark.parametrize(
    "hyperparameter",
    [
        Brightness(name="mine"),
        Categorical("mine", ["a", "b"]),
        Cutout(name="mine"),
        ExampleWeights(3, name="mine"),
        GroupWeights(["a", "b"], name="mine"),
        Integer("mine", 1, 3, 2),
        LabelSmoothing(name="mine"),
        LossWeights(["a", "b"], name="mine"),
        Scalar("mine", 1.0),
        WeightNetwork(name="mine"),
    ],
    ids=lambda h: type(h).__name__,
)
def test_the_lines_to_add_have_the_attribute_s_own_name(hyperparameter: Hyperparameter) -> None:
    shown = hyperparameter.shown_usage()
    assert shown.startswith("self.mine = None")
    assert len(re.findall(r"\bself\.", shown)) == len(re.findall(r"\bself\.mine\b", shown)) > 1


def test_label_smoothing_is_that_of_torch_and_differentiable() -> None:
    smoothing = built(LabelSmoothing(0.2))
    logits, labels = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 5
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(smoothing(logits, labels), expected)
    (found,) = torch.autograd.grad(smoothing(logits, labels), smoothing.tensors["value"])
    step = 1e-6

    def moved(by: float) -> Tensor:
        value = smoothing.transform.forward(smoothing.tensors["value"].detach() + by)
        return functional.cross_entropy(logits, labels, label_smoothing=float(value))

    assert float(found) == pytest.approx(float((moved(step) - moved(-step)) / (2 * step)), rel=1e-6)
    vector = HyperparameterVector([smoothing])
    h = torch.linspace(-2, 2, 7, dtype=torch.float64).unsqueeze(1)
    with vector.bound(h) as values:
        each = [
            functional.cross_entropy(logits[i : i + 1], labels[i : i + 1], label_smoothing=float(e))
            for i, e in enumerate(values["label_smoothing"])
        ]
        torch.testing.assert_close(smoothing(logits, labels), torch.stack(each).mean())


def test_label_smoothing_works_with_implicit_gradients() -> None:
    """The other engines: against central differences of the retrained optimum."""
    smoothing = built(LabelSmoothing(0.2))
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 3
    x_val, y_val = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 3

    def inner(w: Tensor) -> Tensor:
        return smoothing(x @ w, y) + 0.05 * w.square().sum()

    def optimum() -> Tensor:
        w = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = inner(w)
            loss.backward()
            return loss

        optimizer.step(closure)
        smoothing.tensors["value"].grad = None
        return w

    raw, w = smoothing.tensors["value"], optimum()
    (found,) = implicit_hypergradient(inner(w), functional.cross_entropy(x_val @ w, y_val), (w,), (raw,))
    losses = []
    for by in (1e-4, -1e-4):
        raw.data.add_(by)
        losses.append(float(functional.cross_entropy(x_val @ optimum(), y_val).detach()))
        raw.data.sub_(by)
    assert float(found) == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3)


def test_whole_numbers_and_choices() -> None:
    count, kind = built(Integer("count", 1, 4, 2)), built(Categorical("kind", ["a", "b", "c"], init=1))
    assert float(count.value()) == 2.0
    assert kind.choice() == "b"
    vector = HyperparameterVector([count, kind])
    h = torch.tensor([[-30.0, 5.0, 0.0, 0.0], [30.0, 0.0, 0.0, 5.0]], dtype=torch.float64)
    with vector.bound(h) as values:
        assert values["count"].tolist() == [1.0, 4.0]
        assert values["kind"].tolist() == [0.0, 2.0]
        assert kind.choice() == ["a", "c"]
    for number in (1, 2, 3, 4):
        with vector.bound(
            vector.at_values({"count": number, "kind": number - 2 if number > 1 else 0})
        ) as values:
            assert float(values["count"]) == number
            assert kind.choice() == "abc"[max(0, number - 2)]
