"""The linear layer against its formula."""

from __future__ import annotations

import torch
from torch import nn

from lightning_nested.hypernetworks import HyperLinear
from tests.hypernetworks.networks import BATCH, N, point


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
