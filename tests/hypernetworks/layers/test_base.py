"""Layers called by themselves: values, counts and derivatives in every way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nested.hypernetworks import HyperConv1d, HyperConv2d, HyperEmbedding, HyperLinear, HyperLSTM
from tests.hypernetworks.networks import BATCH, N, point


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
