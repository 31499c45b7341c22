"""Hypernetwork for hyperparameters that act on one weight each, such as a decay per weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_nested.arguments import checked
from lightning_nested.hypernetworks.response import Response
from lightning_nested.linalg.vectors import unflatten


@checked
class DiagonalResponse(Response):
    """wᵢ(h) = w₀ᵢ + dᵢ hᵢ: each weight responds to a hyperparameter of its own, with N parameters beside w₀.

    For ``WeightDecay(per="parameter")`` over all parameters. A response of low rank gives every decay a share in few
    common directions, and cannot say that the i-th moves the i-th weight first. This one can, and no more: trained
    beside independent perturbations it settles at dᵢ = −e^{λᵢ} wᵢ / Hᵢᵢ with H the curvature of loss and decays,
    the response where H is diagonal, and the best diagonal one elsewhere. The outer gradient is then the implicit one
    with diag(H)⁻¹ in place of H⁻¹. One h for the batch.

    Args:
        module: Any module of N parameters that require gradients.
        num_hyperparameters: n; must be N. The i-th belongs to the i-th weight in the order of
            ``module.named_parameters()``.

    >>> response = DiagonalResponse(nn.Linear(2, 1), 3)
    >>> _ = nn.init.constant_(response.slopes[0], 0.5)  # of the two weights; the bias keeps zero
    >>> [change.flatten().tolist() for change in response.changes(torch.tensor([2.0, -2.0, 7.0])).values()]
    [[1.0, -1.0], [0.0]]
    """

    def __init__(self, module: nn.Module, num_hyperparameters: int) -> None:
        super().__init__(module, num_hyperparameters)
        size = self.num_parameters()["general"]
        if num_hyperparameters != size:
            raise ValueError(
                f"num_hyperparameters must be the number of weights, {size}. Got {num_hyperparameters}; other numbers "
                "of hyperparameters need best_response(), FactorisedResponse or DenseResponse."
            )
        self.slopes = nn.ParameterList(torch.zeros_like(p) for p in self.general_parameters().values())  # d

    def changes(self, delta: Tensor) -> dict[str, Tensor]:
        """d ∘ ``delta``, by parameter."""
        pieces = unflatten(delta, list(self.slopes))
        named = zip(self.general_parameters(), self.slopes, pieces, strict=True)
        return {name: d * piece for name, d, piece in named}
