"""Number of parameters of the responses of all weights at once."""

from __future__ import annotations

from torch import nn

from lightning_nested.hypernetworks import DenseResponse, FactorisedResponse, best_response
from tests.hypernetworks.networks import N


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
