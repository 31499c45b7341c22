"""One hyperparameter per weight: the diagonal response where it is exact, and where it is the best there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lightning_nested.hypernetworks import DiagonalResponse
from tests.cases import DOUBLE, ridge_data


def test_a_weight_follows_its_own_hyperparameter_and_no_other() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    response = DiagonalResponse(net, 11)
    assert response.num_parameters() == {"general": 11, "response": 11}
    for slope in response.slopes:
        nn.init.normal_(slope)

    def flat(h: torch.Tensor) -> torch.Tensor:
        return torch.cat([w.flatten() for w in response.weights(h).values()])

    h = torch.randn(11, dtype=DOUBLE)
    jacobian = torch.autograd.functional.jacobian(flat, h)
    slopes = torch.cat([d.detach().flatten() for d in response.slopes])
    torch.testing.assert_close(jacobian, torch.diag(slopes), rtol=0, atol=0)
    response.recenter(h)
    before = flat(torch.zeros(11, dtype=DOUBLE)).detach()
    torch.testing.assert_close(
        before, torch.cat([p.detach().flatten() for p in net.parameters()]), rtol=0, atol=1e-14
    )


def test_the_number_must_be_the_weights() -> None:
    with pytest.raises(ValueError, match=r"number of weights, 8\. Got 1; other numbers.*FactorisedResponse"):
        DiagonalResponse(nn.Linear(3, 2), 1)


def test_coupled_weights_get_the_best_diagonal() -> None:
    """On ridge, at dᵢ = −e^{λᵢ} wᵢ / Hᵢᵢ the expected derivative of Delta-STN's loss is zero, to O(σ²)."""
    x, y, *_ = ridge_data()
    x, n, sigma = x[:, :4], len(y), 1e-4
    h = torch.tensor([-1.0, -0.5, 0.0, 0.5], dtype=DOUBLE)
    curvature = x.T @ x / n + torch.diag(h.exp())
    best = torch.linalg.solve(curvature, x.T @ y / n)
    net = nn.Linear(4, 1, bias=False).double()
    response = DiagonalResponse(net, 4)
    response.center.copy_(h)
    with torch.no_grad():
        response.module.weight.copy_(best)
        response.slopes[0].copy_(-h.exp() * best / curvature.diag())

    def derivative() -> torch.Tensor:
        total = torch.zeros((), dtype=DOUBLE)
        for signs in itertools.product((-1.0, 1.0), repeat=4):  # the expectation, exactly
            tried = h + sigma * torch.tensor(signs, dtype=DOUBLE)
            weights = response.weights(tried)["weight"]
            with response.at(tried, "linearized"):
                fit = 0.5 * (response(x).squeeze(-1) - y).square().mean()
            total = total + (fit + 0.5 * (tried.exp() * weights.square()).sum()) / 16
        return torch.autograd.grad(total, [response.slopes[0]])[0] / sigma**2

    # In units of H d: the remainder is of relative order σ² = 1e-8.
    assert float(derivative().abs().max()) < 1e-6
    with torch.no_grad():
        response.slopes[0].mul_(1.01)
    assert float(derivative().abs().max()) > 1e-3
