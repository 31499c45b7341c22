"""Weights that are read past their layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_nested.hypernetworks import best_response
from tests.hypernetworks.networks import BATCH, N, point


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
