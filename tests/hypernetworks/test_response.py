"""Evaluation, export, precision and bad input of responses, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_nested.hypernetworks import DenseResponse, FactorisedResponse, best_response
from tests.capabilities import bf16_or_skip
from tests.hypernetworks.networks import ALL, BATCH, CASES, WHOLE, N, made, point


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_export_is_the_plain_network(name: str, train: bool) -> None:
    response, module, x = made(name, train)
    h = point()
    plain = response.export(h)
    assert [type(m) for m in plain.modules()] == [type(m) for m in module.modules()]
    assert list(plain.state_dict()) == list(module.state_dict())
    torch.testing.assert_close(plain(x), response(x, h), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        next(plain.parameters()).add_(1.0)  # a copy: nothing is held in common
    assert not torch.equal(next(plain.parameters()), next(iter(response.weights(h).values())))


@pytest.mark.parametrize("name", ALL)
def test_general_mode_is_the_center(name: str) -> None:
    response, module, x = made(name)
    response.center.fill_(0.7)
    with response.at(point(), "general"):
        torch.testing.assert_close(response(x), module(x), rtol=0, atol=0)
    torch.testing.assert_close(response(x, response.center), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "transformer", "factorised"])
def test_recenter_keeps_the_function(name: str) -> None:
    response, _, x = made(name)
    h, other = point(), point()
    before = [response(x, h).detach(), response(x, other).detach()]
    response.recenter(h)
    assert torch.equal(response.center, h)
    with response.at(other, "general"):
        torch.testing.assert_close(response(x), before[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(response(x, other), before[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "convolutions", "language model"])
def test_under_autocast_the_layers_keep_its_precision(name: str) -> None:
    response, module, x = made(name)
    response, module = response.float(), module.float()
    x = x.float() if x.is_floating_point() else x
    with torch.autocast("cpu", torch.bfloat16):
        expected = bf16_or_skip(lambda: module(x)).dtype
        for mode in ("response", "linearized"):
            for h in (torch.randn(N), torch.randn(BATCH, N)):
                with response.at(h, mode):  # type: ignore[arg-type]
                    y = response(x)
                assert y.dtype == expected
                y.float().square().sum().backward()


@pytest.mark.parametrize("name", [*CASES, "transposed", *WHOLE])
def test_half_precision(name: str) -> None:
    """Weights in bfloat16; where they are evaluated stays in float32."""
    response, _, x = made(name)
    response.to(torch.bfloat16)
    x = x.bfloat16() if x.is_floating_point() else x
    assert response.center.dtype == response.point.dtype == torch.float32
    points = [torch.randn(N)] if response.one_point_only() else [torch.randn(N), torch.randn(BATCH, N)]
    for h in points:
        for mode in ("response", "linearized", "general"):
            with response.at(h, mode):  # type: ignore[arg-type]
                y = response(x)
            assert y.dtype == torch.bfloat16
            y.float().square().sum().backward()
    response.recenter(points[0])
    assert torch.equal(response.center, points[0])
    assert response.double().center.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), (2, 3)),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh()), (2, 1, 3, 3)),
    ],
)
def test_higher_derivatives_with_one_point_of_each_example(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """First and second, backward and forward mode, and those of torch.func, with the parameters substituted."""
    torch.manual_seed(0)
    response = best_response(make().double(), N).eval()
    for p in response.response_parameters().values():
        nn.init.normal_(p)
    names, x, h = (
        [n for n, _ in response.named_parameters()],
        torch.randn(*shape, dtype=torch.float64),
        point(2),
    )

    def f(*values: Tensor) -> Tensor:
        return torch.func.functional_call(response, dict(zip(names, values, strict=True)), (x, h))

    values = [p.detach().clone().requires_grad_() for p in response.parameters()]
    assert torch.autograd.gradcheck(f, values, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, values)
    jacobians = [by(lambda p: f(p, *values[1:]))(values[0]) for by in (torch.func.jacrev, torch.func.jacfwd)]
    torch.testing.assert_close(*jacobians, rtol=1e-12, atol=1e-12)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False).tanh()


def test_activation_checkpoints_are_refused_where_they_would_find_other_weights() -> None:
    """The second forward happens in the backward pass, when the substituted weights are gone."""
    response, x = best_response(Checkpointed(), N), torch.randn(BATCH, 5)
    for h in (torch.randn(N), torch.randn(BATCH, N)):
        with pytest.raises(RuntimeError, match=r"torch.utils.checkpoint.*Leave it out"):
            response(x, h)
    with response.at(torch.randn(N), "general"):
        response(x).sum().backward()


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.other = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) @ self.other.weight


def test_bad_input() -> None:
    frozen = nn.Linear(5, 3).requires_grad_(False)
    with pytest.raises(ValueError, match=r"must have a parameter that requires gradients. Got Linear"):
        best_response(frozen, N)
    with pytest.raises(ValueError, match=r"Got ReLU with none"):
        best_response(nn.ReLU(), N)
    with pytest.raises(ValueError, match=r"lazy"):
        best_response(nn.LazyLinear(3), N)
    for wrong in (
        lambda: best_response(nn.Linear(5, 3), 0),
        lambda: best_response(nn.ConvTranspose2d(2, 3, 2), N, rank=0),
        lambda: FactorisedResponse(nn.Linear(5, 3), N, rank=0),
        lambda: DenseResponse(nn.Linear(5, 3), N, hidden=()),
    ):
        with pytest.raises(ValueError, match=r"at least 1"):
            wrong()
    response = best_response(nn.Linear(5, 3), N)
    x = torch.randn(BATCH, 5)
    with pytest.raises(ValueError, match=r"needs h as its last argument"):
        response(x)
    with pytest.raises(ValueError, match=r"Got \(4,\)"):
        response(x, torch.zeros(4))
    with pytest.raises(ValueError, match=r"as many examples .* as h has rows, 7"):
        response(x, torch.zeros(7, N))
    with (
        pytest.raises(ValueError, match=r"weights= and change= need one h"),
        response.at(torch.zeros(4, N), weights={}),
    ):
        pass
    with pytest.raises(
        ValueError, match=r"Got batch_dim=0 and MultiheadAttention 'self_attn' with batch_first=False"
    ):
        best_response(nn.TransformerEncoderLayer(8, 2, 16), N)(torch.randn(4, 5, 8), torch.zeros(4, N))
    with pytest.raises(ValueError, match=r"Got other that are not"):
        best_response(Unused(), N)(x, torch.zeros(BATCH, N))
    assert best_response(Unused(), N)(x, torch.zeros(N)).shape == (BATCH, 5)
