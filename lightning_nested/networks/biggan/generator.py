"""Generator of BigGAN, with the layers of the widely used PyTorch configuration for CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.arguments import checked
from lightning_nested.networks.biggan.blocks import GeneratorBlock, attention_layers
from lightning_nested.networks.biggan.tables import (
    FIRST_SIDE,
    GENERATORS,
    Initialization,
    check_labels,
    check_sizes,
    initialize,
    is_channels_last,
)
from lightning_nested.networks.conditional_batch_norm import ClassEmbedding, ConditionalBatchNorm2d
from lightning_nested.networks.spectral_norm import SpectralNormConv2d, SpectralNormLinear


@checked
class Generator(nn.Module):
    """Generator from z and a class to an image in [−1, 1], by residual blocks that each double the side.

    At 32 px: a linear layer to 4·width channels of 4×4, three blocks, then batch norm, ReLU, 3×3, tanh.
    Convolutions and linear layers are spectrally normalized. Gain and bias of each conditional batch norm are
    an ``nn.Embedding`` of the class of its own, not normalized; or with ``shared_dim`` a normalized linear
    function of one embedding that all share, and with ``hierarchical`` of a slice of z beside it.

    Brock, Donahue & Simonyan (2019), ICLR, arXiv 1809.11096.

    Args:
        width: Base number of channels.
        latent_dim: Numbers in z.
        num_classes: Number of classes.
        resolution: Side of the image: 32, 64, 128 or 256.
        image_channels: 3 for colour, 1 for grey.
        attention: Sides after which :class:`SelfAttention` follows, such as ``(64,)``.
        shared_dim: Width of a class embedding shared by all layers; 0: one embedding per layer.
        hierarchical: Give each block its own slice of z; needs ``shared_dim`` and a ``latent_dim`` that the
            number of blocks plus one divides.
        initialization: ``"normal"``, N(0, 0.02²) for all weights and embeddings, or ``"orthogonal"`` weights
            beside N(0, 0.02²) embeddings and zero biases: at first only z tells images apart.

    Shape:
        z ``(N, latent_dim)``, labels ``(N,)`` of type long or mixtures of classes ``(N, num_classes)``;
        output ``(N, image_channels, resolution, resolution)``.

    Example:
        >>> generator = Generator()
        >>> sum(p.numel() for p in generator.parameters())
        4304387
        >>> tuple(Generator(width=4, latent_dim=16)(torch.zeros(2, 16), torch.tensor([0, 9])).shape)
        (2, 3, 32, 32)
    """

    def __init__(
        self,
        width: int = 64,
        latent_dim: int = 128,
        num_classes: int = 10,
        resolution: int = 32,
        *,
        image_channels: int = 3,
        attention: Sequence[int] = (),
        shared_dim: int = 0,
        hierarchical: bool = False,
        initialization: Initialization = "normal",
    ) -> None:
        super().__init__()
        check_sizes(
            resolution,
            width=width,
            latent_dim=latent_dim,
            num_classes=num_classes,
            image_channels=image_channels,
        )
        widths = GENERATORS[resolution]
        slices = len(widths) if hierarchical else 1
        if hierarchical and (shared_dim < 1 or latent_dim % slices):
            raise ValueError(
                f"hierarchical needs shared_dim >= 1 and a latent_dim that {slices} divides. "
                f"Got shared_dim={shared_dim} and latent_dim={latent_dim}; "
                f"take latent_dim={max(1, latent_dim // slices) * slices}."
            )
        self.latent_dim, self.num_classes, self.resolution = latent_dim, num_classes, resolution
        self.image_channels = image_channels
        self.slice_dim = latent_dim // slices
        self.hierarchical = hierarchical
        condition_dim = shared_dim + (self.slice_dim if hierarchical else 0)

        def layer(channels: int) -> nn.Module:
            if shared_dim:
                return SpectralNormLinear(condition_dim, channels, bias=False)
            return ClassEmbedding(num_classes, channels)

        def norm(channels: int) -> ConditionalBatchNorm2d:
            return ConditionalBatchNorm2d(channels, layer(channels), layer(channels))

        channels = [width * multiple for multiple in widths]
        self.shared = ClassEmbedding(num_classes, shared_dim) if shared_dim else None
        self.linear = SpectralNormLinear(self.slice_dim, channels[0] * FIRST_SIDE**2)
        self.blocks = nn.ModuleList(
            GeneratorBlock(fan_in, fan_out, norm) for fan_in, fan_out in pairwise(channels)
        )
        sides = [FIRST_SIDE * 2**block for block in range(1, len(widths))]
        self.attention = attention_layers(sorted(attention), sides, channels)
        self.norm = nn.BatchNorm2d(channels[-1])
        self.conv = SpectralNormConv2d(channels[-1], image_channels, 3, padding=1)
        initialize(self, initialization)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return images of the classes ``labels``."""
        check_labels(labels, self.num_classes)
        condition = labels if self.shared is None else self.shared(labels)
        if self.hierarchical:
            z, *rest = torch.split(z, self.slice_dim, dim=1)
            conditions = [torch.cat((condition, part), dim=1) for part in rest]
        else:
            conditions = [condition] * len(self.blocks)
        h: Tensor = self.linear(z).unflatten(1, (-1, FIRST_SIDE, FIRST_SIDE))
        if is_channels_last(self.conv.weight):
            h = h.contiguous(memory_format=torch.channels_last)
        for index, block in enumerate(self.blocks):
            h = block(h, conditions[index])
            if str(index) in self.attention:
                h = self.attention[str(index)](h)
        return torch.tanh(self.conv(functional.relu(self.norm(h))))
