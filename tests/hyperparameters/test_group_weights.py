"""Weights of groups, in the loss and in how often a sampler draws them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nested.hyperparameters import GroupSampler, GroupWeights
from tests.hyperparameters.built import built

GROUPS = torch.tensor([0, 1, 1, 2, 2, 2])


def test_the_mean_of_weighted_losses_is_the_mixture_of_the_groups_means() -> None:
    weights = built(GroupWeights(["a", "b", "c"], init=[5, 3, 2], shares=[1, 2, 3]))
    losses = torch.tensor([1.0, 2.0, 4.0, 3.0, 6.0, 9.0], dtype=torch.float64)
    mixture = 0.5 * 1.0 + 0.3 * 3.0 + 0.2 * 6.0
    torch.testing.assert_close((losses * weights(GROUPS)).mean().item(), mixture, rtol=1e-14, atol=0)
    assert {n: round(float(v), 12) for n, v in weights.values().items()} == {"a": 0.5, "b": 0.3, "c": 0.2}
    # Equal shares, unless said otherwise.
    equal = built(GroupWeights(["a", "b", "c"], init=[5, 3, 2]))
    torch.testing.assert_close(equal(torch.arange(3)).tolist(), [1.5, 0.9, 0.6], rtol=1e-14, atol=0)


def test_weights_of_what_a_sampler_draws_are_one_with_the_derivative_of_the_mixture() -> None:
    means = torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64)
    weights = built(GroupWeights(["a", "b", "c"], init=[5, 3, 2]))
    (leaf,) = weights.tensors.values()
    (expected,) = torch.autograd.grad(leaf.softmax(0) @ means, leaf)
    weights.sampler(GROUPS)
    # Ten draws by the weights: five, three and two.
    drawn = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    assert weights(drawn).tolist() == pytest.approx([1.0] * 10, rel=1e-14)
    (found,) = torch.autograd.grad((weights(drawn) * means[drawn]).mean(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


def drawn_groups(sampler: GroupSampler, count: int) -> Tensor:
    return torch.bincount(GROUPS[[i for _, i in zip(range(count), sampler, strict=False)]], minlength=3)


@pytest.mark.parametrize("count", [7, 50, 1000])
def test_any_run_of_draws_has_the_weights_shares(count: int) -> None:
    weights = built(GroupWeights(["a", "b", "c"], init=[6, 3, 1]))
    counts = drawn_groups(weights.sampler(GROUPS, 1000), count)
    assert float((counts - count * torch.tensor([0.6, 0.3, 0.1])).abs().max()) <= 2


def test_a_change_of_the_weights_is_followed_at_once_and_a_group_of_weight_zero_is_never_drawn() -> None:
    weights = built(GroupWeights(["a", "b", "c"]))
    draws = iter(weights.sampler(GROUPS, 1000))
    first = GROUPS[[next(draws) for _ in range(30)]]
    assert sorted(torch.bincount(first).tolist()) == [10, 10, 10]
    with torch.no_grad():
        weights.tensors["weights"].copy_(torch.tensor([0.0, 0.0, -800.0]))
    # Of the credit that it has left, one more draw at most.
    assert int((GROUPS[[next(draws) for _ in range(100)]] == 2).sum()) <= 1


def test_each_example_comes_once_before_any_comes_again_and_the_seed_decides_the_order() -> None:
    weights = built(GroupWeights(["a", "b", "c"]))
    loader: Any = DataLoader(torch.arange(6), batch_size=9, sampler=weights.sampler(GROUPS, 27))  # type: ignore[arg-type]

    def epoch() -> list[int]:
        torch.manual_seed(3)
        return torch.cat(list(loader)).tolist()

    rows = epoch()
    assert len(loader) == 3
    assert sorted(i for i in rows if i >= 3) == sorted([3, 4, 5] * 3)
    assert rows == epoch()
    assert rows != torch.cat(list(loader)).tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupWeights(["a"]), "two or more different names"),
        (lambda: GroupWeights(["a", "a"]), "two or more different names"),
        (lambda: GroupWeights(["a", "b"], init=[1, 0]), "init must be one positive number per name"),
        (lambda: GroupWeights(["a", "b"], shares=[1]), "shares must be one positive number per name"),
        (lambda: GroupWeights(["a", "b"])(torch.tensor([2])), r"lie in \[0, 2\).*Got 2"),
        (lambda: GroupWeights(["a", "b"])(torch.tensor([0.5])), "integers. Got torch.float32"),
        (
            lambda: GroupWeights(["a", "b"]).sampler(torch.tensor([0])),
            "examples of every name. Got none of b",
        ),
        (lambda: GroupWeights(["a", "b"]).sampler(torch.tensor([0, 1]), 0), "num_samples must be at least 1"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
