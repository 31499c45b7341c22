"""BigGAN's generator and discriminator: the layers of the widely used PyTorch configuration for CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.networks.biggan_blocks import DiscriminatorBlock, GeneratorBlock, SelfAttention
from lightning_nested.networks.biggan_tables import DISCRIMINATORS, GENERATORS, check_resolution
from lightning_nested.networks.conditional_batch_norm import ClassEmbedding, ConditionalBatchNorm2d
from lightning_nested.networks.spectral_norm import (
    SpectralNormConv2d,
    SpectralNormEmbedding,
    SpectralNormLayer,
    SpectralNormLinear,
)

Initialization = Literal["normal", "orthogonal"]
_FIRST_SIDE = 4


class Generator(nn.Module):
    """z and a class to an image in [−1, 1], by residual blocks that each double the side.

    At 32 px: a linear layer to 4·width channels of 4×4, three blocks, then batch norm, ReLU, 3×3, tanh.
    Convolutions and linear layers are spectrally normalised. Gain and bias of each conditional batch norm are
    an ``nn.Embedding`` of the class of its own, not normalised; or with ``shared_dim`` a normalised linear
    function of one embedding that all share, and with ``hierarchical`` of a slice of z beside it.

    Brock, Donahue & Simonyan (2019), ICLR, arXiv 1809.11096.

    Args:
        width: Base number of channels.
        latent_dim: Numbers in z.
        num_classes: Of the labels.
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

    Raises:
        ValueError: If a size is not possible, or a label is not in [0, num_classes).

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
        check_resolution(resolution)
        _check_sizes(
            width=width, latent_dim=latent_dim, num_classes=num_classes, image_channels=image_channels
        )
        table = GENERATORS[resolution]
        _check_attention(attention, table.sides)
        slices = len(table.sides) + 1 if hierarchical else 1
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

        channels = [width * multiple for multiple in table.widths]
        self.shared = ClassEmbedding(num_classes, shared_dim) if shared_dim else None
        self.linear = SpectralNormLinear(self.slice_dim, channels[0] * _FIRST_SIDE**2)
        self.blocks = nn.ModuleList(
            GeneratorBlock(fan_in, fan_out, norm) for fan_in, fan_out in pairwise(channels)
        )
        self.attention = nn.ModuleDict(
            {
                str(block): SelfAttention(channels[block + 1])
                for block, side in enumerate(table.sides)
                if side in attention
            }
        )
        self.norm = nn.BatchNorm2d(channels[-1])
        self.conv = SpectralNormConv2d(channels[-1], image_channels, 3, padding=1)
        _initialize(self, initialization)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Images of the classes ``labels``."""
        check_labels(labels, self.num_classes)
        condition = labels if self.shared is None else self.shared(labels)
        if self.hierarchical:
            z, *rest = torch.split(z, self.slice_dim, dim=1)
            conditions = [torch.cat((condition, part), dim=1) for part in rest]
        else:
            conditions = [condition] * len(self.blocks)
        h: Tensor = self.linear(z).unflatten(1, (-1, _FIRST_SIDE, _FIRST_SIDE))
        if is_channels_last(self.conv.weight):
            h = h.contiguous(memory_format=torch.channels_last)
        for index, block in enumerate(self.blocks):
            h = block(h, conditions[index])
            if str(index) in self.attention:
                h = self.attention[str(index)](h)
        return torch.tanh(self.conv(functional.relu(self.norm(h))))


class Discriminator(nn.Module):
    """An image and a class to one number, by residual blocks without normalisation of activations.

    D(x, y) = w·φ(x) + b + e(y)·φ(x), φ the sum over positions of the last block's ReLU: the projection
    discriminator. Every layer is spectrally normalised, the embedding e too.

    Brock, Donahue & Simonyan (2019), ICLR, arXiv 1809.11096; Miyato & Koyama (2018), ICLR, arXiv 1802.05637.

    Args:
        width: Base number of channels.
        num_classes: Of the labels.
        resolution: Side of the image: 32, 64, 128 or 256.
        image_channels: 3 for colour, 1 for grey.
        attention: Sides after which :class:`SelfAttention` follows.
        initialization: As of :class:`Generator`.

    Shape:
        images ``(N, image_channels, resolution, resolution)``, labels ``(N,)``; output ``(N,)``.

    Raises:
        ValueError: If a size is not possible, an image has another shape, or a label is out of range.

    Example:
        >>> sum(p.numel() for p in Discriminator().parameters())
        4207361
    """

    def __init__(
        self,
        width: int = 64,
        num_classes: int = 10,
        resolution: int = 32,
        *,
        image_channels: int = 3,
        attention: Sequence[int] = (),
        initialization: Initialization = "normal",
    ) -> None:
        super().__init__()
        check_resolution(resolution)
        _check_sizes(width=width, num_classes=num_classes, image_channels=image_channels)
        table = DISCRIMINATORS[resolution]
        sides = table.sides(resolution)
        _check_attention(attention, sides)
        self.num_classes = num_classes
        self.image_shape = (image_channels, resolution, resolution)
        channels = [image_channels, *(width * multiple for multiple in table.widths)]
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(
                channels[block], channels[block + 1], preactivate=block > 0, downsample=downsample
            )
            for block, downsample in enumerate(table.downsample)
        )
        first = {side: block for block, side in reversed(list(enumerate(sides)))}
        self.attention = nn.ModuleDict(
            {str(first[side]): SelfAttention(channels[first[side] + 1]) for side in attention}
        )
        self.linear = SpectralNormLinear(channels[-1], 1)
        self.embedding = SpectralNormEmbedding(num_classes, channels[-1])
        _initialize(self, initialization)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """One number per image; larger is more real."""
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images must have shape (N, {', '.join(map(str, self.image_shape))}). "
                f"Got {tuple(images.shape)}. Pad, resize, or build the networks for this shape."
            )
        check_labels(labels, self.num_classes)
        h = images
        for index, block in enumerate(self.blocks):
            h = block(h)
            if str(index) in self.attention:
                h = self.attention[str(index)](h)
        features = functional.relu(h).sum(dim=(2, 3))
        score: Tensor = self.linear(features).squeeze(1) + (self.embedding(labels) * features).sum(dim=1)
        return score


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError for a class that does not exist; on CPU only, since elsewhere it would wait."""
    if torch.compiler.is_compiling() or labels.device.type != "cpu" or not len(labels):
        return
    if labels.is_floating_point():
        if labels.ndim != 2 or labels.shape[1] != num_classes:
            raise ValueError(f"Mixtures must have shape (N, {num_classes}). Got {tuple(labels.shape)}.")
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must lie in 0 … {num_classes - 1}. Got {low if low < 0 else high}. "
            "Set num_classes of both networks to the number of classes of the data."
        )


def is_channels_last(weight: Tensor) -> bool:
    """Whether a network was moved by ``module.to(memory_format=torch.channels_last)``."""
    # A single channel or a 1×1 kernel has both formats at once; this is asked of a 3×3 with many channels.
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _check_sizes(**sizes: int) -> None:
    wrong = {name: size for name, size in sizes.items() if size < 1}
    if wrong:
        raise ValueError(f"{', '.join(sizes)} must be at least 1. Got {wrong}.")


def _check_attention(attention: Sequence[int], sides: Sequence[int]) -> None:
    unknown = [side for side in attention if side not in sides]
    if unknown:
        raise ValueError(f"attention must name sides of block outputs, {sorted(set(sides))}. Got {unknown}.")


def _initialize(module: nn.Module, initialization: Initialization) -> None:
    if initialization not in ("normal", "orthogonal"):
        raise ValueError(f"initialization must be 'normal' or 'orthogonal'. Got {initialization!r}.")
    orthogonal = initialization == "orthogonal"
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if orthogonal:
                nn.init.orthogonal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            else:  # biases keep torch's own
                nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(layer, nn.Embedding):
            # Orthogonal rows would be as large as z's share of a channel: images of a class came out alike.
            nn.init.normal_(layer.weight, std=0.02)
        if isinstance(layer, SpectralNormLayer):
            layer.match_vectors()
