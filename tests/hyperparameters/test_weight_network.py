"""Weights of examples by a network: the integral of the weight, its derivatives, features."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nested.hyperparameters import WeightNetwork
from tests.hyperparameters.built import built


@pytest.fixture
def network() -> WeightNetwork:
    """One whose weight rises and falls with the loss."""
    found = built(WeightNetwork(hidden=5))
    torch.manual_seed(0)
    with torch.no_grad():
        found.tensors["output.weight"].normal_()
    return found


def test_the_derivative_of_a_weighted_loss_by_the_loss_is_its_weight(network: WeightNetwork) -> None:
    losses = torch.linspace(0.0, 4.0, 9, dtype=torch.float64, requires_grad=True)
    weighted = network(losses)
    assert weighted.shape == losses.shape
    assert weighted[0].item() == 0.0
    (slopes,) = torch.autograd.grad(weighted.sum(), losses)
    expected = network.weights(losses).detach()
    assert float(expected.max() - expected.min()) > 0.3
    # 16 nodes on tanh of a slope of about 2 over an interval of 4: measured, as are 3e-2 for 8 and 1e-7 for 32 nodes.
    torch.testing.assert_close(slopes, expected, rtol=0, atol=1e-3)


def test_every_tensor_has_the_derivative_of_a_difference(network: WeightNetwork) -> None:
    losses = torch.tensor([0.3, 2.0, 5.0], dtype=torch.float64)
    for leaf in network.tensors.values():
        (slope,) = torch.autograd.grad(network(losses).sum(), leaf)
        found, step = [], 1e-6
        for by in (step, -2 * step, step):
            with torch.no_grad():
                leaf.add_(by)
                found.append(float(network(losses).sum()))
        assert float(slope.sum()) == pytest.approx((found[0] - found[1]) / (2 * step), rel=1e-6)


def test_every_example_begins_with_weight_one_before_and_after_it_is_built() -> None:
    losses = torch.rand(4, 3) * 5
    network = WeightNetwork()
    for _ in range(2):
        torch.testing.assert_close(network(losses), losses)
        network.build({})


def test_features_take_the_place_of_the_losses_and_are_detached() -> None:
    network = built(WeightNetwork(hidden=4, inputs=3))
    with torch.no_grad():
        network.tensors["output.weight"].fill_(1.0)
    losses = torch.rand(6, dtype=torch.float64, requires_grad=True)
    features = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weighted = network(losses, features)
    torch.testing.assert_close(weighted, network.weights(features) * losses)
    slopes: tuple[Tensor | None, ...] = torch.autograd.grad(
        weighted.sum(), (losses, features), allow_unused=True
    )
    torch.testing.assert_close(slopes[0], network.weights(features).detach())
    assert slopes[1] is None


def test_half_losses_are_widened() -> None:
    network = built(WeightNetwork())
    assert network(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64
    assert WeightNetwork()(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    torch.testing.assert_close(
        network(torch.ones(2, dtype=torch.bfloat16)).tolist(), [1.0, 1.0], rtol=1e-12, atol=0
    )


def test_weights_have_the_mean_one_on_the_first_batch_after_an_outer_step(network: WeightNetwork) -> None:
    first, second = torch.rand(2, 7, dtype=torch.float64) * 4
    network.project_()
    network(first)
    assert network.weights(first).mean().item() == pytest.approx(1.0, rel=1e-12)
    # The same function until the next outer step.
    before = network.weights(second).detach()
    network(second)
    assert torch.equal(before, network.weights(second).detach())
    assert before.mean().item() != pytest.approx(1.0, rel=1e-3)
    network.project_()
    network(second)
    assert network.weights(second).mean().item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("bias", [-60.0, -1.0])
def test_an_example_of_a_later_batch_has_at_most_eleven_times_the_weight_of_equal_ones(bias: float) -> None:
    network = built(WeightNetwork(hidden=5))
    with torch.no_grad():
        # σ is e³⁰ times as large for a loss of 9 as for one of 0.
        network.tensors["hidden.weight"].fill_(1.0)
        network.tensors["hidden.bias"].fill_(-3.0)
        network.tensors["output.weight"].fill_(15.0)
        network.tensors["output.bias"].fill_(bias)
    network(torch.zeros(4, dtype=torch.float64))
    found = network.weights(torch.tensor([0.0, 9.0], dtype=torch.float64)).tolist()
    assert found == pytest.approx([1.0, 11.0], rel=1e-4)


def test_a_step_of_the_output_is_as_long_for_many_hidden_units_as_for_few() -> None:
    moved = []
    for hidden in (4, 4000):
        network = built(WeightNetwork(hidden=hidden))
        with torch.no_grad():
            network.tensors["hidden.weight"].fill_(1.0)
            network.tensors["hidden.bias"].zero_()
            network.tensors["output.weight"].add_(0.05)
        network(torch.zeros(4, dtype=torch.float64))
        moved.append(network.weights(torch.tensor([2.0], dtype=torch.float64)).item())
    r = 2 / (1 + math.exp(-0.05 * math.tanh(2.0)))  # σ(0.05 tanh 2) over σ(0)
    torch.testing.assert_close(moved, [11 * r / (10 + r)] * 2, rtol=1e-12, atol=0)


def test_saved_and_copied_networks_are_the_same_function(network: WeightNetwork) -> None:
    losses = torch.rand(5, dtype=torch.float64)
    network(losses * 3)
    other = built(WeightNetwork(hidden=5))
    other.load_state_dict(network.state_dict(), network.kind())
    twins = [other, copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    for twin in twins:
        assert set(twin.tensors) == set(network.tensors)
        assert torch.equal(twin(losses), network(losses))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightNetwork(hidden=0), "hidden must be at least 1"),
        (lambda: WeightNetwork(inputs=2)(torch.ones(3)), "features must be given where inputs is above 1"),
        (
            lambda: WeightNetwork(inputs=2)(torch.ones(3), torch.ones(3, 4)),
            r"shape \(batch, 2\).*Got \(3, 4\)",
        ),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
