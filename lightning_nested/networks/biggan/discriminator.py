"""Discriminator of BigGAN."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.arguments import at_least, checked
from lightning_nested.networks.biggan.blocks import DiscriminatorBlock, attention_layers
from lightning_nested.networks.biggan.tables import (
    DISCRIMINATORS,
    Initialization,
    check_labels,
    check_sizes,
    initialize,
)
from lightning_nested.networks.spectral_norm import SpectralNormEmbedding, SpectralNormLinear


@checked
class Discriminator(nn.Module):
    """Discriminator from an image and a class to one number, by residual blocks without activation norms.

    D(x, y) = w·φ(x) + b + e(y)·φ(x), φ the sum over positions of the last block's ReLU: the projection
    discriminator. Every layer is spectrally normalized, the embedding e too.

    Brock, Donahue & Simonyan (2019), ICLR, arXiv 1809.11096; Miyato & Koyama (2018), ICLR, arXiv 1802.05637.

    With ``minibatch_group`` it also compares examples: u·m is added, m the :func:`class_deviation` of φ among that many
    successive examples. A generator whose images of a class are alike then gives itself away.

    The arguments have the meaning that they have for :class:`Generator`, but for

    Args:
        minibatch_group: Successive examples that are compared; it must divide the batch size, so that real and
            generated ones are never mixed. 0: every example is judged alone.

    Shape:
        images ``(N, image_channels, resolution, resolution)``, labels ``(N,)``; output ``(N,)``.

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
        minibatch_group: int = 0,
    ) -> None:
        super().__init__()
        at_least(0, minibatch_group=minibatch_group)
        check_sizes(resolution, width=width, num_classes=num_classes, image_channels=image_channels)
        widths, halvings = DISCRIMINATORS[resolution]
        self.num_classes = num_classes
        self.image_shape = (image_channels, resolution, resolution)
        channels = [image_channels, *(width * multiple for multiple in widths)]
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(fan_in, fan_out, preactivate=block > 0, downsample=block < halvings)
            for block, (fan_in, fan_out) in enumerate(pairwise(channels))
        )
        sides = [resolution // 2 ** min(block + 1, halvings) for block in range(len(widths))]
        self.attention = attention_layers(attention, sides, channels)
        self.linear = SpectralNormLinear(channels[-1], 1)
        self.embedding = SpectralNormEmbedding(num_classes, channels[-1])
        self.minibatch_group = minibatch_group
        self.comparison = SpectralNormLinear(channels[-1], 1, bias=False) if minibatch_group else None
        initialize(self, initialization)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return one number per image; larger is more real."""
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images must have shape (N, {', '.join(map(str, self.image_shape))}). "
                f"Got {tuple(images.shape)}. Pad, resize, or build the networks for this shape."
            )
        check_labels(labels, self.num_classes)
        if self.minibatch_group and len(images) % self.minibatch_group:
            raise ValueError(
                f"The number of images must be a multiple of minibatch_group={self.minibatch_group}, so that each is "
                f"compared within its own batch. Got {len(images)}; choose batch sizes that are multiples of it."
            )
        h = images
        for index, block in enumerate(self.blocks):
            h = block(h)
            if str(index) in self.attention:
                h = self.attention[str(index)](h)
        features = functional.relu(h).sum(dim=(2, 3))
        score: Tensor = self.linear(features).squeeze(1) + (self.embedding(labels) * features).sum(dim=1)
        if self.comparison is not None:
            groups = (torch.split(t, self.minibatch_group) for t in (features, labels))
            deviation = torch.cat([class_deviation(*group) for group in zip(*groups, strict=True)])
            score = score + self.comparison(deviation).squeeze(1)
        return score


def class_deviation(features: Tensor, labels: Tensor) -> Tensor:
    """Return m_i = mean |φ_i − φ_j| over the other examples j of i's class, ``(N, F)``; zero where there is none.

    Of the kind of mini-batch discrimination (Salimans et al. 2016, NeurIPS) and of the mini-batch standard deviation
    (Karras et al. 2018, ICLR), within classes.

    >>> class_deviation(torch.tensor([[1.0], [5.0], [4.0]]), torch.tensor([0, 1, 0])).T
    tensor([[3., 0., 3.]])
    """
    same = (labels.unsqueeze(0) == labels.unsqueeze(1)).to(features.dtype)
    same = same - torch.eye(len(labels), dtype=same.dtype, device=same.device)
    apart = (features.unsqueeze(0) - features.unsqueeze(1)).abs()
    return torch.einsum("ij,ijf->if", same / same.sum(dim=1, keepdim=True).clamp(min=1.0), apart)
