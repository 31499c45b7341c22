"""Linear layer whose weights respond to hyperparameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_nested.arguments import at_least, checked
from lightning_nested.hypernetworks.layers.arithmetic import linear
from lightning_nested.hypernetworks.layers.base import HyperLayer, check_examples, placement


@checked
class HyperLinear(HyperLayer, nn.Linear):
    """y = W₀x + b₀ + (V h) ⊙ (W₁x) + (U h) ⊙ b₁.

    ``2(in·out + out) + 2·out·n`` parameters.

    Args:
        in_features: Width of x.
        out_features: Width of y.
        num_hyperparameters: n.
        bias: Add b₀ and b₁.
        device: Device of the parameters.
        dtype: Precision of the parameters.

    Shape:
        x (batch, …, in) with h (n,) or (batch, n); y (batch, …, out).

    >>> layer = HyperLinear(3, 2, num_hyperparameters=5)
    >>> sum(p.numel() for p in layer.parameters()) == 2 * (3 * 2 + 2) + 2 * 2 * 5
    True
    """

    plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_hyperparameters: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        at_least(0, in_features=in_features, out_features=out_features)
        at_least(1, num_hyperparameters=num_hyperparameters)
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.respond(num_hyperparameters)

    def _per_example(self, x: Tensor, delta: Tensor, linearized: bool) -> Tensor:
        dim = self._batch_dim
        check_examples(x, delta, dim, type(self).__name__)
        return self._responded(linear, x, delta, placement(x.dim(), dim, -1), linearized)
