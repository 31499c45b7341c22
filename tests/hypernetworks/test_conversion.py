"""Conversion, evaluation, linearisation and export, each against an independent computation in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from lightning_nested.hypernetworks import (
    BestResponse,
    DenseResponse,
    FactorisedResponse,
    HyperConv1d,
    HyperConv2d,
    HyperEmbedding,
    HyperLinear,
    HyperLSTM,
    Response,
    best_response,
)
from tests.capabilities import bf16_or_skip

N, BATCH = 3, 4


class LanguageModel(nn.Module):
    """Embedding, LSTM and an output layer that shares the embedding's weight."""

    def __init__(self, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 6, 2, batch_first=batch_first, **options)
        self.output = nn.Linear(6, 20)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.lstm(self.embedding(tokens))[0][..., :6])


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.GroupNorm(2, 4), nn.Flatten(2),
            nn.Conv1d(4, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(45, 3), nn.LayerNorm(3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def tokens() -> Tensor:
    return torch.randint(1, 20, (BATCH, 5))  # 0 is padding: no gradient by definition


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)),
        lambda: torch.randn(BATCH, 5),
    ),
    "sequences": (lambda: nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)), lambda: torch.randn(BATCH, 2, 5)),
    "convolutions": (Convolutions, lambda: torch.randn(BATCH, 2, 6, 6)),
    "language model": (LanguageModel, tokens),
    "bidirectional": (lambda: LanguageModel(bidirectional=True), tokens),
}
ONE_POINT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        lambda: torch.randn(BATCH, 5, 8),
    ),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2), lambda: torch.randn(BATCH, 2, 4, 4)),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)),
        lambda: torch.randn(BATCH, 5),
    ),
}
WHOLE: dict[str, Callable[[nn.Module], Response]] = {
    "dense": lambda m: DenseResponse(m, N, hidden=(6, 5)),
    "factorised": lambda m: FactorisedResponse(m, N, rank=2),
}


def made(name: str, train: bool = False) -> tuple[Response, nn.Module, Tensor]:
    """A response with random parameters, the module it was made of and an input."""
    torch.manual_seed(0)
    make, data = {**CASES, **ONE_POINT}.get(name, CASES["mlp"])
    module = make().double()
    x = data()
    x = x.double() if x.is_floating_point() else x
    response = WHOLE[name](module) if name in WHOLE else best_response(module, N)
    for p in response.response_parameters().values():
        nn.init.normal_(p, std=0.3)
    return response.train(train), module.train(train), x


def point(*shape: int) -> Tensor:
    return torch.randn(*shape, N, dtype=torch.float64)


ALL = [*CASES, *ONE_POINT, *WHOLE]


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


@pytest.mark.parametrize(
    ("layer", "shape", "count"),
    [
        (lambda: HyperLinear(5, 3, N), (BATCH, 5), 2 * (5 * 3 + 3) + 2 * 3 * N),
        (lambda: HyperLinear(5, 3, N, bias=False), (BATCH, 5), 2 * 5 * 3 + 3 * N),
        (lambda: HyperConv1d(2, 3, 3, N), (BATCH, 2, 8), 2 * (2 * 3 * 3 + 3) + 2 * 3 * N),
        (lambda: HyperConv2d(2, 3, 3, N, stride=2), (BATCH, 2, 8, 8), 2 * (2 * 3 * 9 + 3) + 2 * 3 * N),
        (lambda: HyperEmbedding(9, 4, N), (BATCH, 3), 2 * 9 * 4 + 9 * N),
        (lambda: HyperLSTM(5, 3, N, batch_first=True), (BATCH, 2, 5), 2 * 12 * (5 + 3 + 2) + 4 * 12 * N),
    ],
    ids=["linear", "no bias", "conv1d", "conv2d", "embedding", "lstm"],
)
def test_layers_of_their_own(layer: Callable[[], Any], shape: tuple[int, ...], count: int) -> None:
    layer = layer()
    assert sum(p.numel() for p in layer.parameters()) == count
    layer = layer.double()
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randint(0, 9, shape) if isinstance(layer, HyperEmbedding) else torch.randn(*shape).double()
    h = point(BATCH)
    call = (lambda x, h: layer(x, h=h)[0]) if isinstance(layer, HyperLSTM) else layer
    expected = torch.cat([call(x[i : i + 1], h[i]) for i in range(BATCH)])
    torch.testing.assert_close(call(x, h), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"needs h"):
        layer(x)
    with pytest.raises(ValueError, match=rf"h must have shape \({N},\).*Got \(4, 2\)"):
        call(x, h[:, :2])


def dual_over_reverse(layer: nn.Module, x: Tensor, h: Tensor) -> None:
    """The tangent of a gradient against the gradient's difference; what follows the layer is dual, not the layer."""
    head = torch.randn_like(layer(x, h))
    moved = torch.randn_like(head)
    parameters = list(layer.parameters())

    def gradients(head: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((layer(x, h).tanh() * head).sum(), parameters)

    with torch.autograd.forward_ad.dual_level():
        found = gradients(torch.autograd.forward_ad.make_dual(head, moved))
        tangents = [torch.autograd.forward_ad.unpack_dual(g).tangent for g in found]
    torch.testing.assert_close(tangents, list(gradients(moved)), rtol=1e-12, atol=1e-12)  # linear in the head


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: HyperLinear(3, 2, N), (BATCH, 3)),
        (lambda: HyperLinear(3, 2, N), (BATCH, 2, 3)),
        (lambda: HyperConv1d(2, 2, 3, N), (BATCH, 2, 5)),
    ],
    ids=["linear", "sequence", "conv1d"],
)
def test_a_layers_derivatives_in_every_way(layer: Callable[[], Any], shape: tuple[int, ...]) -> None:
    """Backward, forward mode, of many cotangents at once, and twice, against differences."""
    layer = layer().double()
    for p in layer.parameters():
        nn.init.normal_(p)
    names = [name for name, _ in layer.named_parameters()]

    def output(x: Tensor, h: Tensor, *parameters: Tensor) -> Tensor:
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, weights, (x, h))

    given = [torch.randn(shape), torch.randn(BATCH, N), *layer.parameters()]
    given = [a.detach().double().requires_grad_() for a in given]
    assert torch.autograd.gradcheck(output, given, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(output, given, fast_mode=True)
    dual_over_reverse(layer, given[0], given[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and comparisons of shapes
        traced = torch.jit.trace(layer, tuple(a.detach() for a in given[:2]))
    torch.testing.assert_close(traced(*given[:2]), output(*given), rtol=1e-12, atol=1e-12)


def test_the_linear_layer_is_its_formula() -> None:
    layer = HyperLinear(5, 3, N).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    x, h = torch.randn(BATCH, 5).double(), point(BATCH)
    weight, bias = layer.weight_response, layer.bias_response
    expected = x @ layer.weight.T + layer.bias
    expected = (
        expected + (h @ weight.scale.T) * (x @ weight.direction.T) + (h @ bias.scale.T) * bias.direction
    )
    torch.testing.assert_close(layer(x, h), expected, rtol=1e-13, atol=1e-13)


def test_counts_of_whole_responses() -> None:
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    size = 5 * 7 + 7 + 7 * 3 + 3
    dense, factorised = DenseResponse(net, N, hidden=(6, 5)), FactorisedResponse(net, N, rank=2)
    assert dense.num_parameters() == {"general": size, "response": (N + 1) * 6 + 7 * 5 + 5 * size}
    assert factorised.num_parameters() == {"general": size, "response": 2 * (N + size)}
    assert best_response(nn.ConvTranspose2d(2, 3, 2), N, rank=4).num_parameters() == {
        "general": 27,
        "response": 4 * 27 + 2 * 4 * N,
    }


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


class Norms(nn.Module):
    """Reads a weight past its layer in ways that leave no trace in the output's graph, or in some calls only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.output = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.how, self.penalty = "nothing", torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.layer(x)).tanh()
        if self.how == "constant":
            with torch.no_grad():
                size = self.layer.weight.norm()
            y = y / size
        elif self.how == "product":
            y = y @ self.layer.weight @ self.layer.weight.T
        elif self.how == "side":
            self.penalty = self.layer.weight.square().sum()
        return self.output(y)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("how", ["constant", "product", "side"])
def test_reads_past_a_layer_are_noticed_whenever_they_happen(how: str, grad: bool) -> None:
    """Here after a call without any; statistics of the batch are updated once."""
    torch.manual_seed(0)
    response = best_response(Norms().double(), N)
    for p in response.response_parameters().values():
        nn.init.normal_(p, std=0.3)
    x, h = torch.randn(BATCH, 5, dtype=torch.float64), point()
    found = []
    with torch.set_grad_enabled(grad):
        for suffice in (True, False):
            response.module.how = "nothing"
            with response.at(h, "linearized"):
                response(x)
            assert response._layers_suffice is suffice
            response.module.how = how
            before = int(response.module.norm.num_batches_tracked)
            with response.at(h, "linearized"):
                y = response(x)
            assert int(response.module.norm.num_batches_tracked) == before + 1
            found.append(y)
            if how == "side" and grad:
                phi = response.module.layer.weight_response.scale
                assert float(torch.autograd.grad(response.module.penalty, phi)[0].norm()) > 0.1
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert not response._layers_suffice


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


# ---- bad input


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
    with pytest.raises(ValueError, match=r"Got others that hold self_attn.in_proj_weight.*shape \(n,\)"):
        best_response(nn.TransformerEncoderLayer(8, 2, 16), N)(torch.randn(4, 5, 8), torch.zeros(4, N))
    with pytest.raises(ValueError, match=r"Got other that are not"):
        best_response(Unused(), N)(x, torch.zeros(BATCH, N))
    assert best_response(Unused(), N)(x, torch.zeros(N)).shape == (BATCH, 5)


def test_a_module_with_frozen_parameters_responds_with_the_others() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    net[0].requires_grad_(False)
    response = best_response(net, N)
    assert list(response.general_parameters()) == ["1.weight", "1.bias"]
    x, h = torch.randn(BATCH, 5), torch.randn(BATCH, N)
    assert response(x, h).shape == (BATCH, 3)
    assert not any("module.0.weight" in n for n in response.response_parameters())


# ---- awkward modules


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
