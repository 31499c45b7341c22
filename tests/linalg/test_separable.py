"""Terms that act on every weight alone are a diagonal of the Hessian, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_nested.linalg.curvature import HessianOperator, gradient_with_graph
from lightning_nested.linalg.graph import vjp
from lightning_nested.linalg.separable import separate
from tests.cases import DOUBLE

Loss = Callable[[tuple[Tensor, ...]], Tensor]


def weights() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 4), (4,), (4, 4))
    return tuple((torch.rand(s, generator=generator, dtype=DOUBLE) + 0.5).requires_grad_() for s in shapes)


X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
H = torch.linspace(-1, 1, 16, dtype=DOUBLE).reshape(4, 4).requires_grad_()


def fit(w: tuple[Tensor, ...]) -> Tensor:
    return functional.linear(X, w[0], w[1]).tanh().square().mean()


# Losses, and the parameters that have a term of their own.
CASES: dict[str, tuple[Loss, set[int]]] = {
    "one decay each": (lambda w: fit(w) + (H.exp() * w[0] ** 4).sum() + w[1].pow(3).mean(), {0, 1}),
    "several terms": (lambda w: fit(w) + (w[0].log() * w[0]).sum() + (w[0] / H.exp()).square().sum(), {0}),
    "nothing else": (lambda w: (w[0].sigmoid() * H).sum() + functional.softplus(w[1]).sum(), {0, 1}),
    "a factor of the data": (lambda w: fit(w) + X.var() * w[0].square().sum(), {0}),
    "a fit alone": (fit, set()),
    "a product of two": (lambda w: fit(w) + (w[0] * w[2]).square().sum(), set()),
    "another order": (lambda w: fit(w) + (w[0] * w[0].T).square().sum(), set()),
    "a norm": (lambda w: fit(w) + w[0].square().sum().sqrt(), set()),
    "a square of a sum": (lambda w: fit(w) + w[0].sum().square(), set()),
    "rows and columns": (lambda w: fit(w) + (w[0] * w[1]).square().sum(), set()),
    "a strength that is learned": (lambda w: fit(w) + w[1].sum().exp() * w[0].square().sum(), set()),
    "flipped": (lambda w: fit(w) + (w[1] * w[1].flip(0)).sum(), set()),
}


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_whole_graph(name: str) -> None:
    loss, alone = CASES[name]
    params = weights()
    operator = HessianOperator(loss(params), params)
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        v = tuple(torch.randn(p.shape, generator=generator, dtype=DOUBLE) for p in params)
        expected = vjp(operator.gradient, params, v, retain_graph=True)
        for found, whole in zip(operator @ v, expected, strict=True):
            whole = torch.zeros_like(found) if whole is None else whole
            torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    parts = separate(operator.gradient, params)
    diagonals = set() if parts is None else {i for i, d in enumerate(parts.diagonal) if d is not None}
    assert diagonals == alone


def test_the_term_is_left_out_of_later_products() -> None:
    params = weights()
    operator = HessianOperator(fit(params) + (H * params[0].sin()).sum(), params)
    seen = []
    for _ in range(2):
        with torch.profiler.profile() as record:
            operator.matvec(tuple(torch.ones_like(p) for p in params))
        seen.append({event.key for event in record.key_averages()})
    assert "CosBackward0" in seen[0]
    assert "CosBackward0" not in seen[1]
    assert "TanhBackwardBackward0" in seen[1]


def test_parameters_that_are_no_leaves_are_not_split() -> None:
    params = weights()
    inside = tuple(p * 2.0 for p in params)
    loss = CASES["one decay each"][0](inside)
    assert separate(gradient_with_graph(loss, inside), inside) is None


class Exp(torch.autograd.Function):
    """Sums up, under the name of a pointwise function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.cumsum(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].flip(0).cumsum(0).flip(0)


def test_a_custom_function_is_not_taken_for_torchs_of_that_name() -> None:
    w = (torch.arange(1.0, 4.0, dtype=DOUBLE).requires_grad_(),)
    operator = HessianOperator((w[0] * Exp.apply(w[0])).sum(), w)
    # Of wᵀ C w with C the lower triangle of ones.
    lower = torch.ones(3, 3, dtype=DOUBLE).tril()
    v = (torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE),)
    torch.testing.assert_close((operator @ v)[0], (lower + lower.T) @ v[0])
