"""Fully connected network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from lightning_nested.arguments import at_least, checked, fraction

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


@checked
class MLP(nn.Module):
    """Fully connected network ``x → W_L σ(… σ(W_1 x + b_1) …) + b_L``.

    ``tanh`` is twice differentiable everywhere, which is what comparisons of hypergradients with finite
    differences want; ``relu`` trains faster and its second derivative is zero almost everywhere.

    Args:
        in_features: numbers per example, after flattening.
        hidden: width of each hidden layer; empty for a linear model.
        num_classes: width of the output.
        activation: σ, ``"relu"`` or ``"tanh"``.
        dropout: probability of dropping each hidden unit in train mode.
        flatten: flatten all but the first dimension of the input, so that images can be fed as they are.

    Shape:
        Input ``(batch, in_features)``, or with ``flatten`` ``(batch, …)`` of ``in_features`` numbers each.
        Output ``(batch, num_classes)``.

    Example:
        >>> import torch
        >>> network = MLP(64, hidden=(32,), num_classes=10)
        >>> tuple(network(torch.zeros(5, 1, 8, 8)).shape)
        (5, 10)
        >>> sum(parameter.numel() for parameter in network.parameters())
        2410
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (128,),
        num_classes: int = 10,
        activation: Literal["relu", "tanh"] = "relu",
        dropout: float = 0.0,
        flatten: bool = True,
    ) -> None:
        super().__init__()
        fraction(dropout=dropout)
        widths = [in_features, *hidden, num_classes]
        at_least(1, in_features=in_features, hidden=hidden, num_classes=num_classes)
        layers: list[nn.Module] = [nn.Flatten()] if flatten else []
        for fan_in, fan_out in pairwise(widths[:-1]):
            layers += [nn.Linear(fan_in, fan_out), _ACTIVATIONS[activation]()]
            if dropout > 0.0:
                layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(widths[-2], widths[-1]))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        logits: Tensor = self.layers(x)
        return logits
