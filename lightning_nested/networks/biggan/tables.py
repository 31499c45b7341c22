"""Tables of BigGAN's blocks at each resolution, checks of its sizes and labels, and its initialization."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_nested.arguments import at_least
from lightning_nested.networks.spectral_norm import SpectralNormLayer

Initialization = Literal["normal", "orthogonal"]
FIRST_SIDE = 4
# Widths in multiples of the base width, by resolution: the input of the first block, then the output of each. Every
# block doubles the side, which starts at FIRST_SIDE.
GENERATORS: dict[int, tuple[int, ...]] = {
    32: (4, 4, 4, 4),
    64: (16, 16, 8, 4, 2),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
}
# Output width of each block in multiples of the base width, and how many blocks, the first ones, halve the side.
DISCRIMINATORS: dict[int, tuple[tuple[int, ...], int]] = {
    32: ((4, 4, 4, 4), 2),
    64: ((1, 2, 4, 8, 16), 4),
    128: ((1, 2, 4, 8, 16, 16), 5),
    256: ((1, 2, 4, 8, 8, 16, 16), 6),
}


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError for a class that does not exist. Labels on a GPU are not checked: reading them would wait."""
    if torch.compiler.is_compiling() or labels.device.type != "cpu" or not len(labels):
        return
    if labels.is_floating_point():
        if labels.ndim != 2 or labels.shape[1] != num_classes:
            raise ValueError(f"Mixtures must have shape (N, {num_classes}). Got {tuple(labels.shape)}.")
        return
    if labels.ndim != 1:
        raise ValueError(f"Class numbers must have shape (N,). Got {tuple(labels.shape)}; flatten them.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must lie in 0 … {num_classes - 1}. Got {low if low < 0 else high}. "
            "Number the classes from 0. Set num_classes of both networks to the number of classes of the data."
        )


def is_channels_last(weight: Tensor) -> bool:
    """Return True if a network was moved by ``module.to(memory_format=torch.channels_last)``."""
    # A single channel or a 1×1 kernel has both formats at once; this is asked of a 3×3 with many channels.
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def check_sizes(resolution: int, **sizes: int) -> None:
    """Raise ValueError for a resolution without a table, or another size below 1."""
    if resolution not in GENERATORS:
        raise ValueError(
            f"resolution must be one of {', '.join(map(str, GENERATORS))}. Got {resolution}. "
            "Resize or pad the images to the next of them."
        )
    at_least(1, **sizes)


def initialize(module: nn.Module, initialization: Initialization) -> None:
    """Initialize all layers in place."""
    orthogonal = initialization == "orthogonal"
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if orthogonal:
                nn.init.orthogonal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            else:
                # Biases keep torch's own initialization.
                nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(layer, nn.Embedding):
            # Orthogonal rows would be as large as z's share of a channel: images of a class came out alike.
            nn.init.normal_(layer.weight, std=0.02)
        if isinstance(layer, SpectralNormLayer):
            layer.match_vectors()
