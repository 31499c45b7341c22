"""The recurrence's derivatives against autograd through its steps, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nested.hypernetworks import HyperLSTM, best_response
from lightning_nested.hypernetworks.layers.recurrence import lstm_recurrence, plain_recurrence

STEPS, BATCH, UNITS = 5, 3, 4


def arguments(with_direction: bool) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(STEPS, BATCH, 4 * UNITS), (BATCH, UNITS), (BATCH, UNITS), (4 * UNITS, UNITS)]
    shapes += [(4 * UNITS, UNITS), (BATCH, 4 * UNITS)] if with_direction else []
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def ours(inputs: Tensor, hidden: Tensor, cell: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return lstm_recurrence(inputs, (hidden, cell), *rest)


def reference(*given: Tensor) -> tuple[Tensor, Tensor]:
    return plain_recurrence(*given[:4], *(given[4:] or (None, None)), linearized=False)  # type: ignore[call-arg, misc]


@pytest.mark.parametrize("with_direction", [False, True])
def test_values_and_both_modes_are_autograds(with_direction: bool) -> None:
    given = arguments(with_direction)
    for ours_, theirs in zip(ours(*given), reference(*given), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(ours, given, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ours, given)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("with_direction", [False, True])
def test_one_result_alone_and_some_gradients_alone(with_direction: bool, used: int) -> None:
    given = arguments(with_direction)
    given[1].requires_grad_(False)
    given[3].requires_grad_(False)
    wanted = [a for a in given if a.requires_grad]
    found, expected = (
        torch.autograd.grad(function(*given)[used].square().sum(), wanted) for function in (ours, reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_torch_func_goes_through_the_steps() -> None:
    given = [a.detach() for a in arguments(True)]
    found, expected = (
        torch.func.grad(lambda w, f=function: f(*given[:3], w, *given[4:])[0].sum())(given[3])
        for function in (ours, reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True, "num_layers": 2},
        {"bias": False},
        {"batch_first": True},
        {"num_layers": 2, "dropout": 0.4},
    ],
    ids=str,
)
def test_the_layer_is_torchs(options: dict[str, Any]) -> None:
    """Values, states, gradients and tangents of one h of each example (all the same) and of dual weights."""
    torch.manual_seed(0)
    layer = HyperLSTM(2, UNITS, 3, **options).double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn((BATCH, STEPS, 2) if options.get("batch_first") else (STEPS, BATCH, 2)).double()
    h = torch.randn(3).double()
    layers = layer.num_layers * (2 if layer.bidirectional else 1)
    state = (torch.randn(layers, BATCH, UNITS).double(), torch.randn(layers, BATCH, UNITS).double())

    def results(h: Tensor) -> list[Tensor]:
        torch.manual_seed(1)  # dropout
        y, (hidden, cell) = layer(x, state, h=h)
        total = y.square().sum() + (hidden * cell).sum()
        return [y, hidden, cell, *torch.autograd.grad(total, list(layer.parameters()))]

    torch.testing.assert_close(results(h.expand(BATCH, 3)), results(h), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("each", [False, True])
def test_the_linearised_lstm_needs_no_second_derivatives(each: bool) -> None:
    """Forward mode serves an LSTM, with states given and dropout between its layers."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(2, UNITS, 2, dropout=0.3)

        def forward(self, x: Tensor) -> Tensor:
            y, (_, cell) = self.lstm(x)
            return y + cell[0]

    torch.manual_seed(0)
    response = best_response(Model().double(), 3, batch_dim=1)
    for p in response.response_parameters().values():
        nn.init.normal_(p, std=0.3)
    x, h = (
        torch.randn(STEPS, BATCH, 2).double(),
        torch.randn(BATCH, 3).double() if each else torch.randn(3).double(),
    )
    u, phi = torch.randn(STEPS, BATCH, UNITS).double(), list(response.response_parameters().values())

    def evaluate() -> list[Tensor]:
        torch.manual_seed(1)
        with response.at(h, "linearized"):
            y = response(x)
        return [y, *torch.autograd.grad((u * y).sum(), phi)]

    found = evaluate()
    assert not response._double_vjp
    if each:  # the sum over examples, each at its point
        return
    response._double_vjp = True
    torch.testing.assert_close(found, evaluate(), rtol=1e-10, atol=1e-10)


def test_half_precision_and_autocast() -> None:
    layer = HyperLSTM(2, UNITS, 3)
    x, h = torch.randn(STEPS, BATCH, 2), torch.randn(BATCH, 3)
    expected = layer(x, h=h)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, h=h)[0]
        y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"), [("state", r"Expected hidden\[0\] size"), ("x", "must be equal")]
)
def test_wrong_shapes_are_refused_as_by_torch(wrong: str, message: str) -> None:
    layer = HyperLSTM(2, UNITS, 3)
    x, h = torch.randn(STEPS, BATCH, 3 if wrong == "x" else 2), torch.randn(BATCH, 3)
    state = torch.zeros(1, BATCH - 1 if wrong == "state" else BATCH, UNITS)
    with pytest.raises(RuntimeError, match=message):
        layer(x, (state, state), h=h)


def test_rows_and_steps_of_the_recurrence() -> None:
    """One row of coefficients serves all examples, and there may be no step; W₁ must have W₀'s shape."""
    given = arguments(True)
    alone = [*given[:5], given[5][:1]]
    torch.testing.assert_close(ours(*alone), reference(*alone), rtol=1e-12, atol=1e-12)
    assert ours(given[0][:0], *given[1:])[0].shape == (0, BATCH, UNITS)
    with pytest.raises(ValueError, match=r"W₁ must have W₀'s shape \(16, 4\)\. Got \(3, 4\)"):
        ours(*given[:4], given[4][:3], given[5])
