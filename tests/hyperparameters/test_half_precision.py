"""Inner parameters in bfloat16: hyperparameters are kept in float32, where their small steps are not rounded away."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_nested.hypergradient import DiagonalOperator
from lightning_nested.hyperparameters import (
    ExampleWeights,
    Hyperparameter,
    LearningRate,
    LossWeights,
    OuterStep,
    WeightDecay,
)
from tests.conftest import Normal

HALF, EPS = torch.bfloat16, torch.finfo(torch.bfloat16).eps
PER = ["model", "tensor", "parameter"]


@pytest.mark.parametrize(
    "hyperparameter",
    [*map(WeightDecay, PER), ExampleWeights(3), LossWeights(["a", "b"]), LearningRate(0.1)],
)
def test_unconstrained_tensors_are_at_least_float32(hyperparameter: Hyperparameter) -> None:
    if isinstance(hyperparameter, LearningRate):
        hyperparameter.attach([0.1])
    for given, kept in [
        (HALF, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ]:
        hyperparameter.reset()
        hyperparameter.build({"w": torch.ones(2, dtype=given)})
        assert {t.dtype for t in hyperparameter.tensors.values()} == {kept}


@pytest.mark.parametrize("per", PER)
def test_a_decay_moves_with_bfloat16_parameters(per: Any) -> None:
    # Around the log-decay of −9.2 bfloat16 has a spacing of 0.06: steps of 0.05, Adam's here, were lost each time.
    outer = OuterStep([WeightDecay(per)], optimizer=lambda t: torch.optim.SGD(t, lr=1.0))
    w = torch.tensor([1.0, 2.0], dtype=HALF, requires_grad=True)
    outer.build({"w": w}, "cpu")
    start = outer.tensors[0].detach().clone()
    outer.compute((w**2).sum(), w.sum(), {"w": w})
    outer.apply()
    # dL/dλ = −1ᵀH⁻¹(w ∂d/∂λ) with H = 2 + d and ∂d/∂λ = d: it moves by wᵢd/2, summed where they share it.
    expected = 1e-4 * torch.tensor([0.5, 1.0]) if per == "parameter" else torch.tensor(1.5e-4)
    got = outer.tensors[0].detach() - start
    spacing = 9.3 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got, expected.expand_as(got), rtol=2 * EPS, atol=spacing)


@pytest.mark.parametrize("per", PER)
def test_the_closed_forms_are_those_of_float32(per: Any, normal: Normal) -> None:
    values = {n: normal(*shape).float() for n, shape in {"a": (3, 2), "b": (4,)}.items()}
    v = tuple(normal(*p.shape).float() for p in values.values())
    decay = WeightDecay(per, init=0.1)
    decay.build(values)
    exact, rounded = (
        decay.linearize({n: p.to(dtype) for n, p in values.items()}) for dtype in (torch.float32, HALF)
    )
    half = tuple(a.to(HALF) for a in v)
    for got, expected in zip(rounded.mixed(half), exact.mixed(v), strict=True):
        assert got.dtype == torch.float32
        # Three roundings a product, of at most |w v d| each.
        bound = 0.1 * sum(float((p * a).abs().sum()) for p, a in zip(values.values(), v, strict=True))
        torch.testing.assert_close(got, expected, rtol=0, atol=1.5 * EPS * bound)
    for got, expected in zip(rounded.curvature() @ half, exact.curvature() @ v, strict=True):
        assert got.dtype == HALF
        torch.testing.assert_close(got.float(), expected, rtol=1.5 * EPS, atol=0)


def test_a_diagonal_is_cast_to_its_vector() -> None:
    diagonal = DiagonalOperator([torch.tensor([2.0, 3.0])])
    v = (torch.ones(2, dtype=HALF),)
    assert (diagonal @ v)[0].dtype == HALF
    added = (diagonal + diagonal) @ v
    assert added[0].dtype == HALF
    assert added[0].tolist() == [4.0, 6.0]


def test_weights_widen_half_losses_to_float32() -> None:
    example, loss = ExampleWeights(2), LossWeights(["a", "b"])
    half = {"w": torch.zeros(1, dtype=HALF)}
    example.build(half)
    loss.build(half)
    losses = torch.ones(2, dtype=HALF)
    assert (losses * example(torch.tensor([0, 1]))).dtype == torch.float32
    assert loss({"a": losses[0], "b": losses[1]}).dtype == torch.float32
    assert (losses.double() * example(torch.tensor([0, 1]))).dtype == torch.float64
