"""Conversion of any module, against an independent computation in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_nested.hypernetworks import Response, best_response
from lightning_nested.hypernetworks.response import Mode
from tests.hypernetworks.networks import BATCH, CASES, ONE_POINT, Convolutions, LanguageModel, N, made, point


@pytest.mark.parametrize("name", [*CASES, *ONE_POINT])
def test_at_first_the_network_is_the_plain_one(name: str) -> None:
    torch.manual_seed(0)
    make, data = {**CASES, **ONE_POINT}[name]
    module = make().double().eval()
    x = data()
    x = x.double() if x.is_floating_point() else x
    names, before = list(dict(module.named_parameters())), copy.deepcopy(module.state_dict())
    response = best_response(module, N).eval()
    torch.testing.assert_close(response(x, point()), module(x), rtol=0, atol=1e-13)
    assert list(response.general_parameters()) == names
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert not any(type(m).__name__.startswith("Hyper") for m in module.modules())


@pytest.mark.parametrize("name", CASES)
def test_one_point_of_each_example_is_each_example_at_its_point(name: str) -> None:
    response, _, x = made(name)
    h = point(BATCH)
    together = response(x, h)
    alone = torch.cat([response(x[i : i + 1], h[i]) for i in range(BATCH)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    for p, q in zip(
        torch.autograd.grad(together.square().sum(), list(response.parameters())),
        torch.autograd.grad(alone.square().sum(), list(response.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_shared_weights_are_converted_once_and_still_shared() -> None:
    response, _, x = made("language model")
    layers = response.module
    assert layers.embedding.weight is layers.output.weight
    assert layers.embedding.weight_response is layers.output.weight_response
    h = point()
    plain = response.export(h)
    assert plain.embedding.weight is plain.output.weight
    rows = 20 * 6 + 20 * N  # once
    lstm = sum(4 * 6 * (2 * 6 + 2) + 4 * 4 * 6 * N for _ in range(2))
    assert response.num_parameters()["response"] == rows + (20 + 20 * N) + lstm
    torch.testing.assert_close(plain(x), response(x, h), rtol=1e-12, atol=1e-12)


class NamedElsewhere(nn.Module):
    """The embedding's weight has its first name in another module, which reads it in a way of its own."""

    class Head(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    def __init__(self) -> None:
        super().__init__()
        embedding = nn.Embedding(7, 3)
        self.head = self.Head(embedding.weight)
        self.embedding = embedding

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def test_a_weight_whose_first_name_is_not_its_layers() -> None:
    torch.manual_seed(0)
    response = best_response(NamedElsewhere().double(), N)
    for p in response.response_parameters().values():
        nn.init.normal_(p)
    assert response.one_point_only() == ("head.weight",)
    assert response.num_parameters() == {"general": 21, "response": 21 + 7 * N}
    tokens, h = torch.randint(7, (BATCH, 2)), point()
    plain = response.export(h)
    assert plain.head.weight is plain.embedding.weight
    torch.testing.assert_close(plain(tokens), response(tokens, h), rtol=1e-12, atol=1e-12)
    with response.at(h, "linearized"):
        y = response(tokens)
    (found,) = torch.autograd.grad(y.sum(), response.module.embedding.weight_response.direction)
    weight = response.module.embedding.weight
    value = torch.func.jacrev(lambda w: w[tokens] @ w.T)(weight.detach())
    slopes = value.sum((0, 1, 2)) * response.module.embedding.weight_response.coefficients(h).unsqueeze(1)
    torch.testing.assert_close(found, slopes, rtol=1e-12, atol=1e-12)


def test_copies_and_checkpoints() -> None:
    response, _, x = made("convolutions", train=True)
    h = point(BATCH)
    twin = copy.deepcopy(response)
    torch.testing.assert_close(twin(x, h), response(x, h), rtol=0, atol=0)
    with torch.no_grad():
        twin.module.layers[0].weight_response.scale.add_(1.0)
    assert not torch.equal(twin(x, h), response(x, h))
    fresh = best_response(Convolutions().double(), N).train()
    fresh.load_state_dict(response.state_dict())
    torch.testing.assert_close(fresh(x, h), response(x, h), rtol=0, atol=0)
    assert int(response.export(h[0]).layers[1].num_batches_tracked) == 3  # buffers are kept


def test_a_network_over_time_and_batch() -> None:
    response = best_response(LanguageModel(batch_first=False).double(), N, batch_dim=1)
    for p in response.response_parameters().values():
        nn.init.normal_(p, std=0.3)
    x, h = torch.randint(0, 20, (5, BATCH)), point(BATCH)
    alone = torch.cat([response(x[:, i : i + 1], h[i]) for i in range(BATCH)], dim=1)
    torch.testing.assert_close(response(x, h), alone, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"batch_dim"):
        best_response(LanguageModel(batch_first=False).double(), N)(x, h)


@pytest.mark.parametrize("linearized", [False, True])
def test_torchvision_resnet(linearized: bool) -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=10)
    response = best_response(network, N)
    x, h = torch.randn(BATCH, 3, 32, 32), torch.randn(BATCH, N)
    mode = "linearized" if linearized else "response"
    for at in (h, h[0]):
        with response.at(at, mode):  # type: ignore[arg-type]
            response(x).square().mean().backward()
    counts = response.num_parameters()
    assert counts["general"] == 11181642
    rows = sum(p.shape[0] for p in network.parameters())
    assert counts["response"] == 11181642 + N * rows
    response.eval()
    torch.testing.assert_close(response.export(h[0])(x), response(x, h[0]), rtol=1e-6, atol=1e-6)


def test_a_layer_under_two_names_is_called_again_and_again() -> None:
    layer = nn.Linear(5, 5).double()
    response = best_response(nn.Sequential(layer, nn.Tanh(), layer), N)
    for p in response.response_parameters().values():
        nn.init.normal_(p, std=0.3)
    x, h = torch.randn(BATCH, 5, dtype=torch.float64), point()
    for _ in range(2):
        torch.testing.assert_close(response(x, h), response.export(h)(x), rtol=1e-12, atol=1e-12)
    assert list(response.general_parameters()) == ["0.weight", "0.bias"]


def test_the_first_order_of_channels_last_convolutions() -> None:
    response = best_response(nn.Conv2d(2, 3, 3).double(), N).to(memory_format=torch.channels_last)
    gradients: dict[str, Tensor | None] = {
        n: torch.randn_like(p) for n, p in response.general_parameters().items()
    }
    h = point()
    with torch.autocast("cpu", torch.bfloat16):
        got = response.first_order(h, gradients)
    torch.testing.assert_close(got, Response.first_order(response, h, gradients), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*CASES, *ONE_POINT])
def test_the_first_order_of_a_loss_without_forming_the_change(name: str) -> None:
    response, _, _ = made(name)
    gradients: dict[str, Tensor | None] = {
        n: torch.randn_like(p) for n, p in response.general_parameters().items()
    }
    gradients[next(iter(gradients))] = None
    h, phi = point(), list(response.response_parameters().values())
    both = [response.first_order(h, gradients), Response.first_order(response, h, gradients)]
    torch.testing.assert_close(both[0], both[1], rtol=1e-12, atol=1e-12)
    for p, q in zip(*(torch.autograd.grad(v, phi, allow_unused=True) for v in both), strict=True):
        assert (p is None) == (q is None)
        if p is not None and q is not None:
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_module_with_frozen_parameters_responds_with_the_others() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    net[0].requires_grad_(False)
    response = best_response(net, N)
    assert list(response.general_parameters()) == ["1.weight", "1.bias"]
    x, h = torch.randn(BATCH, 5), torch.randn(BATCH, N)
    assert response(x, h).shape == (BATCH, 3)
    assert not any("module.0.weight" in n for n in response.response_parameters())


def test_weights_made_of_others_are_no_layer_of_ours() -> None:
    """A pruned layer's parameter is no weight: it responds at one point, and not by the layer's rule."""
    layer = nn.Linear(5, 5)
    with torch.no_grad():
        prune.random_unstructured(layer, "weight", 0.5)
    layer.weight = layer.weight.detach()
    response = best_response(nn.Sequential(layer, nn.Linear(5, 2)), N)
    assert response.one_point_only() == ("0.bias", "0.weight_orig")
    for p in response.response_parameters().values():
        nn.init.normal_(p)
    x, h = torch.randn(BATCH, 5), torch.randn(N)
    torch.testing.assert_close(response.export(h)(x), response(x, h))


class Scaled(nn.Module):
    """A matrix and a scalar that no layer of ours has."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.scale = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.matrix.T)


def test_the_first_order_of_a_scalar_parameter() -> None:
    torch.manual_seed(0)
    response, h = best_response(Scaled().double(), N), point()
    for p in response.response_parameters().values():
        nn.init.normal_(p)
    gradients = {name: torch.randn_like(p) for name, p in response.general_parameters().items()}
    found, expected = response.first_order(h, gradients), Response.first_order(response, h, gradients)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("mode", ["response", "linearized"])
def test_parameters_without_a_layer_under_autocast(mode: Mode) -> None:
    torch.manual_seed(0)
    response, x, h = best_response(Scaled(), N), torch.randn(5, 4), point().float()
    for p in response.response_parameters().values():
        nn.init.normal_(p, std=0.3)
    with response.at(h, mode):
        expected = response(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = response(x)
    # some products of numbers of 8 bits
    torch.testing.assert_close(
        found.float(), expected, rtol=0, atol=0.03 * float(expected.detach().abs().max())
    )
