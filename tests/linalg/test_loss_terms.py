"""What a loss is the mean of, against the number by which the gradient of a single term is divided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_nested.linalg.loss_terms import batch_size, loss_terms

N, T, C = 4, 5, 7
TOKENS = torch.arange(N * T).view(N, T) % C
IGNORED = torch.where(TOKENS == 3, -100, TOKENS)
LEFT = int((IGNORED >= 0).sum())


def entropy(x: Tensor, y: Tensor = TOKENS, **options: object) -> Tensor:
    return functional.cross_entropy(x.transpose(1, 2), y, **options)  # type: ignore[arg-type]


LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], float | None]] = {
    "tokens": (entropy, N * T),
    "flat": (lambda x: functional.cross_entropy(x.flatten(0, 1), TOKENS.flatten()), N * T),
    "examples": (lambda x: functional.cross_entropy(x.mean(1), TOKENS[:, 0]), N),
    "ignored": (lambda x: entropy(x, IGNORED), LEFT),
    "weights of classes": (lambda x: entropy(x, weight=torch.arange(1.0, C + 1)), N * T),
    "smoothing": (lambda x: entropy(x, label_smoothing=0.1), N * T),
    "scaled and divided": (lambda x: 3 * (entropy(x) * 1024) / 8, N * T),
    "mean squares": (lambda x: functional.mse_loss(x, torch.zeros_like(x)), N * T * C),
    "binary": (lambda x: functional.binary_cross_entropy_with_logits(x, torch.ones_like(x)), N * T * C),
    "mean": (lambda x: (x - 1).square().sum(2).mean(), N * T),
    "sums over tokens": (lambda x: entropy(x, reduction="none").sum(1).mean(), N),
    "means of means": (lambda x: entropy(x, reduction="none").mean(1).mean(), N * T),
    "mask": (
        lambda x: (entropy(x, reduction="none") * (TOKENS != 3)).sum() / (TOKENS != 3).sum(),
        int((TOKENS != 3).sum()),
    ),
    "sum": (lambda x: entropy(x, reduction="sum"), 1),
    "divided sum": (lambda x: entropy(x, reduction="sum") / N, N),
    "penalty first": (lambda x: 0.1 * x.square().mean() + entropy(x), N * T),
    "penalty last": (lambda x: entropy(x, reduction="none").mean() + 0.1 * x.square().mean(), N * T),
    "stack": (lambda x: torch.stack([entropy(x), entropy(2 * x)]).sum(), N * T),
    "an operation that says nothing": (lambda x: torch.linalg.vector_norm(x), None),
    "a leaf": (lambda x: torch.zeros((), requires_grad=True), None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_terms_of_a_loss(name: str) -> None:
    loss, terms = LOSSES[name]
    x = torch.randn(N, T, C, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert loss_terms(loss(x * 1.0)) == terms


def test_accumulated_batches_are_not_part_of_a_sum() -> None:
    x = torch.randn(N, T, C, requires_grad=True)
    for divided in (1, 4):
        assert loss_terms(entropy(x, reduction="sum") / N / divided, divided) == pytest.approx(N)
        assert loss_terms(entropy(x) / divided, divided) == N * T


def test_a_graph_that_is_gone_says_nothing() -> None:
    x = torch.randn(N, T, C, requires_grad=True)
    loss = entropy(x)
    loss.backward()
    assert loss_terms(loss) is None
    assert loss_terms(loss.detach()) is None


@dataclass
class Item:
    text: str
    image: Tensor


def test_the_size_of_a_batch_is_that_of_its_first_tensor() -> None:
    x = torch.zeros(3, 2)
    for batch in (x, [x, x[0]], {"id": "a", "scale": torch.ones(()), "x": (x,)}, Item("a", x)):
        assert batch_size(batch) == 3
    assert batch_size({"text": ["a", "b"]}) is None
