"""Hypernetworks for all weights of a small module at once: an MLP, and a linear map through a bottleneck.

Lorraine & Duvenaud (2018), arXiv 1802.09419.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_nested.arguments import at_least, checked
from lightning_nested.hypernetworks.response import Response
from lightning_nested.linalg.vectors import unflatten


def _by_name(vector: Tensor, response: Response) -> dict[str, Tensor]:
    general = response.general_parameters()
    return dict(zip(general, unflatten(vector, list(general.values())), strict=True))


@checked
class DenseResponse(Response):
    """w(h) = w₀ + g(h) − g(0) with g an MLP from h to all N weights; h is h − center.

    ``Σ (inᵢ + 1)·outᵢ`` over the hidden layers, and ``last hidden · N``, parameters beside w₀, which serves as the
    last bias. One h for the batch.

    Args:
        module: Any module; small, as the last layer has N rows.
        num_hyperparameters: n.
        hidden: Widths of g.
    """

    def __init__(self, module: nn.Module, num_hyperparameters: int, hidden: Sequence[int] = (50,)) -> None:
        super().__init__(module, num_hyperparameters)
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden must hold at least one width, each at least 1. Got {tuple(hidden)}.")
        example = next(iter(self.general_parameters().values()))
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise([num_hyperparameters, *hidden]):
            layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        last = nn.Linear(hidden[-1], self.num_parameters()["general"], bias=False)
        nn.init.normal_(last.weight, std=0.01)
        self.hypernetwork = nn.Sequential(*layers, last).to(example)

    def changes(self, delta: Tensor) -> dict[str, Tensor]:
        """Δ of each parameter."""
        delta = delta.to(next(self.hypernetwork.parameters()).dtype)
        both = self.hypernetwork[:-1](torch.stack([delta, torch.zeros_like(delta)]))
        return _by_name(self.hypernetwork[-1](both[0] - both[1]), self)


@checked
class FactorisedResponse(Response):
    """w(h) = w₀ + B A h with a bottleneck of k units: ``k·(n + N)`` parameters beside w₀. One h for the batch.

    With k ≥ min(n, N) it holds every linear response.

    Args:
        module: Any module.
        num_hyperparameters: n.
        rank: k.
    """

    def __init__(self, module: nn.Module, num_hyperparameters: int, rank: int = 10) -> None:
        super().__init__(module, num_hyperparameters)
        at_least(1, rank=rank)
        example = next(iter(self.general_parameters().values())).detach()
        encoder = torch.randn(rank, num_hyperparameters).to(example)
        self.encoder = nn.Parameter(encoder / num_hyperparameters**0.5)
        self.decoder = nn.Parameter(example.new_zeros(self.num_parameters()["general"], rank))

    def changes(self, delta: Tensor) -> dict[str, Tensor]:
        """Δ of each parameter."""
        return _by_name(self.decoder @ (self.encoder @ delta.to(self.encoder.dtype)), self)
