"""The linearized output and its derivatives, against differences and one example at a time, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_nested.hypernetworks import BestResponse, best_response
from tests.hypernetworks.networks import ALL, BATCH, CASES, N, made, point


@pytest.mark.parametrize("path", ["layers", "forward mode", "double vjp"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_linearised_output_and_its_derivatives(name: str, train: bool, path: str) -> None:
    """The value against central differences of f, ∂/∂φ of ⟨u, J·Δ(φ)⟩ against central differences in φ."""
    response, _, x = made(name, train)
    response._double_vjp = path == "double vjp"
    if isinstance(response, BestResponse):
        response._layers_suffice = path == "layers"
    elif path == "layers":
        pytest.skip("no layers of ours")
    h, phi = point(), list(response.response_parameters().values())
    base = {n: p.detach() for n, p in response.general_parameters().items()}
    changes = {n: c.detach() for n, c in response.changes(h).items()}

    def f(step: float) -> Tensor:
        weights = {n: base[n] + step * changes[n] for n in base}
        return torch.func.functional_call(copy.deepcopy(response.module), weights, (x,)).detach()

    step = 1e-5
    expected = f(0.0) + (f(step) - f(-step)) / (2 * step)
    with response.at(h, "linearized"):
        output = response(x)
    # The differences' own error: step² f‴ / 6, with f‴ of order 10³ at most.
    torch.testing.assert_close(output.detach(), expected, rtol=1e-6, atol=1e-6)
    u = torch.randn_like(expected)
    found = torch.autograd.grad((u * output).sum(), phi, allow_unused=True)
    directions = [torch.randn_like(p) for p in phi]

    def value(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(phi, directions, strict=True):
                p.add_(step * d)
        with response.at(h, "linearized"):
            result = float((u * response(x)).sum().detach())
        with torch.no_grad():
            for p, d in zip(phi, directions, strict=True):
                p.sub_(step * d)
        return result

    numeric = (value(1e-5) - value(-1e-5)) / 2e-5
    analytic = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True) if g is not None)
    assert analytic == pytest.approx(numeric, rel=1e-6, abs=1e-6)
    general = list(response.general_parameters().values())
    with response.at(h, "linearized"):
        assert all(g is None for g in torch.autograd.grad(response(x).sum(), general, allow_unused=True))


@pytest.mark.parametrize("name", CASES)
def test_linearised_with_one_point_of_each_example(name: str) -> None:
    response, _, x = made(name)
    h, phi = point(BATCH), list(response.response_parameters().values())
    with response.at(h, "linearized"):
        together = response(x)
    parts = []
    for i in range(BATCH):
        with response.at(h[i], "linearized"):
            parts.append(response(x[i : i + 1]))
    alone = torch.cat(parts)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    u = torch.randn_like(alone)
    for p, q in zip(
        torch.autograd.grad((u * together).sum(), phi, allow_unused=True),
        torch.autograd.grad((u * alone).sum(), phi, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


class ReadTwice(nn.Module):
    """A layer that is called, and whose weight is read beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(5, 5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.drop(x))) @ self.layer.weight


class Packed(nn.Module):
    """Sequences of unequal length, for which the LSTM has no rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([3, 1, 2, 3])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


@pytest.mark.parametrize(("make", "shape"), [(ReadTwice, (4, 5)), (Packed, (4, 3, 5))])
def test_where_layers_do_not_suffice_one_point_is_still_exact(
    make: type[nn.Module], shape: tuple[int, ...]
) -> None:
    """By the weights at h, from the same random numbers; one of each example is refused."""
    torch.manual_seed(0)
    response = best_response(make().double(), N)
    for p in response.response_parameters().values():
        nn.init.normal_(p, std=0.3)
    x, h, phi = (
        torch.randn(*shape, dtype=torch.float64),
        point(),
        list(response.response_parameters().values()),
    )
    found = []
    for suffice in (True, False):  # the second time the layers are not tried
        assert response._layers_suffice is suffice
        torch.manual_seed(1)
        with response.at(h, "linearized"):
            y = response(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), phi), torch.rand(1)))
    response._double_vjp = True
    torch.manual_seed(1)
    with response.at(h, "linearized"):
        y = response(x)
    found.append((y, *torch.autograd.grad(y.square().sum(), phi), torch.rand(1)))
    for others in found[1:]:
        for got, expected in zip(others, found[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for mode in ("response", "linearized"):
        with (
            pytest.raises(ValueError, match=r"layer.weight, which is read elsewhere|padded batch"),
            response.at(point(4), mode),  # type: ignore[arg-type]
        ):
            response(x)
