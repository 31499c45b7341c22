"""SharedAdam: Adam for the tensor, deviations as far as successive gradients agree."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Adam

from lightning_nested.hyperparameters import Scalar, SharedAdam, WeightDecay
from lightning_nested.hyperparameters.shared_adam import default_adam, refuse_shrink
from tests.cases import DOUBLE

OPTIONS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-16}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def moved(gradients: Tensor, shrink: float | None = None, batches: int | None = 10) -> Tensor:
    """Return the values after a step along each of these gradients, from zero."""
    tensor = torch.zeros(gradients.shape[1:], dtype=DOUBLE, requires_grad=True)
    optimizer = SharedAdam([tensor], shrink=shrink, batches=batches, **OPTIONS)
    for gradient in gradients:
        tensor.grad = gradient.clone()
        optimizer.step()
    return tensor.detach()


def adam(gradients: Tensor) -> Tensor:
    tensor = torch.zeros(gradients.shape[1:], dtype=DOUBLE, requires_grad=True)
    optimizer = Adam([tensor], **OPTIONS)
    for gradient in gradients:
        tensor.grad = gradient.clone()
        optimizer.step()
    return tensor.detach()


@pytest.mark.parametrize(("shrink", "batches"), [(1.0, 10), (None, 1)])
def test_without_deviations_it_is_adam_on_one_value(shrink: float | None, batches: int) -> None:
    gradients = normal(7, 20, 10) + 5 * normal(20, 10, seed=1)
    expected = adam(gradients.sum((1, 2), keepdim=True))[0, 0]
    # Seven steps of at most 0.1, from sums of 200 numbers.
    torch.testing.assert_close(moved(gradients, shrink, batches), expected.expand(20, 10), rtol=0, atol=1e-13)


def test_free_deviations_move_as_adam_moves_them_around_the_step_of_the_tensor() -> None:
    gradients = normal(7, 3, 2)
    free = adam(gradients - gradients.mean((1, 2), keepdim=True))
    expected = adam(gradients.sum((1, 2), keepdim=True)) + free - free.mean()
    torch.testing.assert_close(moved(gradients, 0.0), expected, rtol=0, atol=1e-14)
    quarter = adam(gradients.sum((1, 2), keepdim=True)) + 0.25 * (free - free.mean())
    torch.testing.assert_close(moved(gradients, 0.75), quarter, rtol=0, atol=1e-14)


def last_share(gradients: Tensor, batches: int | None) -> float:
    """Return the share of the last step."""
    last = {
        shrink: moved(gradients, shrink, batches) - moved(gradients[:-1], shrink, batches)
        for shrink in (None, 0.0, 1.0)
    }
    return float(((last[None] - last[1.0]) / (last[0.0] - last[1.0])).flatten()[0])


def test_the_share_of_two_gradients() -> None:
    """ρ and its standard error, from products of entries, written out."""
    first, second = gradients = normal(40, seed=1) + 0.4 * normal(2, 40, seed=2)
    first, second = first - first.mean(), second - second.mean()
    products = first * second
    error = products.square().sum().sqrt()
    correlation = float((products.sum() - 2 * error) / (first.norm() * second.norm()))
    correlation -= (1 - correlation) / 6**2
    assert correlation > 0.02
    expected = min(1.0, 2 * correlation / (correlation + (1 - correlation) / 6))
    assert expected < 1
    assert last_share(gradients, 6) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("batches", [None, 4, 100])
@pytest.mark.parametrize("signal", [0.0, 0.3, 2.0])
def test_the_share_follows_the_part_of_a_rounds_mean_that_is_signal(
    signal: float, batches: int | None
) -> None:
    """In the last of 30 steps, from gradients with a constant part of this size beside noise of size one."""
    entries = 20_000
    gradients = signal * normal(entries, seed=1) + normal(31, entries, seed=2)
    share = last_share(gradients, batches)
    power = signal**2 + 1
    # Weights of the 29 pairs are powers of 0.9. A product of two independent entries has the variance power².
    weights = [0.9**k for k in range(29)]
    error = math.sqrt(sum(w**2 for w in weights) / entries) / sum(weights)
    agreement = signal**2 / power - 2 * error
    if batches is not None:
        agreement -= (1 - agreement) / batches**2
    agreement = max(0.0, agreement)
    most = min(batches or 20, 20)
    expected = min(1.0, 2 * agreement / (agreement + (1 - agreement) / most))
    # Three such errors, √2 as large where pairs share a gradient; the share's slope in it is at most 2b. Noise alone
    # gives none.
    assert share == pytest.approx(expected, abs=3 * math.sqrt(2) * error * 2 * most * (signal > 0) + 1e-12)


def test_entries_alone_and_gradients_of_zero_stay_finite() -> None:
    assert moved(normal(4, 1)).isfinite().all()
    assert torch.equal(moved(torch.zeros(4, 3, dtype=DOUBLE)), torch.zeros(3, dtype=DOUBLE))


def built(*hyperparameters: Any) -> list[Tensor]:
    for each in hyperparameters:
        each.build({"a": normal(3, 2), "b": normal(2, 2)})
    return [t for each in hyperparameters for t in each.tensors.values()]


def test_only_decays_of_single_weights_are_shared() -> None:
    first, second, rate = WeightDecay("parameter"), WeightDecay("tensor"), Scalar("rate", 1.0)
    tensors = built(rate, first, second)
    assert type(default_adam([second], tensors, lr=0.1)) is Adam
    optimizer = default_adam([first, second], tensors, lr=0.1)
    plain, shared = optimizer.param_groups
    assert [id(t) for t in shared["params"]] == [id(t) for t in first.tensors.values()]
    assert "shrink" not in plain
    assert (shared["shrink"], shared["betas"]) == (None, (0.9, 0.9))
    before = [t.detach().clone() for t in tensors]
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    for tensor, start in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor.detach(), start - 0.1)


def test_refusals() -> None:
    for options, message in (
        ({"per": "tensor", "shrink": 0.5}, 'shrink needs per="parameter"'),
        ({"per": "parameter", "shrink": 1.5}, r"shrink must lie in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            WeightDecay(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Got weight_decay with shrink=0\.5, and another outer optimizer"):
        refuse_shrink([WeightDecay("parameter", shrink=0.5)])
    refuse_shrink([WeightDecay("parameter")])
