"""Advantages against sums written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_nested.games import generalized_advantages
from tests.cases import DOUBLE

G, L = 0.9, 0.8  # γ, λ


def advantages(values: list[float], *, terminated: list[int], ended: list[int]) -> Tensor:
    """Of rewards 1, 2, 4."""

    def flags(at: list[int]) -> Tensor:
        return torch.tensor([t in at for t in range(3)])[:, None]

    found = generalized_advantages(
        torch.tensor([[1.0], [2.0], [4.0]], dtype=DOUBLE),
        torch.tensor(values, dtype=DOUBLE)[:, None],
        flags(terminated),
        flags(ended),
        discount=G,
        trace=L,
    )
    return found[:, 0]


@pytest.mark.parametrize(
    ("terminated", "ended", "errors"),
    [
        # δₜ = rₜ + γV(sₜ₊₁) − V(sₜ) with V = 5, 6, 7, 8; the last one alone differs at a final state.
        ([], [], [1 + G * 6 - 5, 2 + G * 7 - 6, 4 + G * 8 - 7]),
        ([2], [2], [1 + G * 6 - 5, 2 + G * 7 - 6, 4 - 7]),
        ([], [2], [1 + G * 6 - 5, 2 + G * 7 - 6, 4 + G * 8 - 7]),
    ],
    ids=["goes on", "final state", "time limit"],
)
def test_sums_of_errors(terminated: list[int], ended: list[int], errors: list[float]) -> None:
    a, b, c = errors
    by_hand = torch.tensor([a + G * L * b + (G * L) ** 2 * c, b + G * L * c, c], dtype=DOUBLE)
    found = advantages([5.0, 6.0, 7.0, 8.0], terminated=terminated, ended=ended)
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("terminated", [[0], []], ids=["final state", "time limit"])
def test_nothing_passes_the_end_of_an_episode(terminated: list[int]) -> None:
    """Step 1 is the reset: neither its error nor a later one reaches step 0."""
    found = advantages([5.0, 6.0, 7.0, 8.0], terminated=terminated, ended=[0])
    assert float(found[0]) == pytest.approx(1 - 5 if terminated else 1 + G * 6 - 5)
    assert float(found[1]) == pytest.approx(2 + G * 7 - 6 + G * L * (4 + G * 8 - 7))


def test_full_trace_is_the_discounted_return_and_none_is_one_error() -> None:
    rewards, values = torch.rand(6, 2, dtype=DOUBLE), torch.rand(7, 2, dtype=DOUBLE)
    no = torch.zeros(6, 2, dtype=torch.bool)
    weights = G ** torch.arange(7, dtype=DOUBLE)[:, None]
    total = (weights[:6] * rewards).sum(0) + weights[6] * values[6] - values[0]
    found = generalized_advantages(rewards, values, no, no, discount=G, trace=1.0)
    torch.testing.assert_close(found[0], total)
    found = generalized_advantages(rewards, values, no, no, discount=G, trace=0.0)
    torch.testing.assert_close(found, rewards + G * values[1:] - values[:-1])


def test_gradients_reach_the_values_but_not_that_of_a_final_state() -> None:
    values = torch.zeros(2, requires_grad=True, dtype=DOUBLE)
    for final, expected in ((False, [-1.0, G]), (True, [-1.0, 0.0])):
        flag = torch.tensor([final])
        found = generalized_advantages(torch.ones(1), values, flag, flag, discount=G)
        (gradient,) = torch.autograd.grad(found.sum(), values)
        torch.testing.assert_close(gradient, torch.tensor(expected, dtype=DOUBLE))
