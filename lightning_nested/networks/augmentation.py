"""Network that changes images at random, to be learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, gelu, interpolate

from lightning_nested.arguments import at_least, checked, positive


@checked
class AugmentationNetwork(nn.Module):
    """U-Net from an image and noise to an augmented image, x + s·tanh(U(x, ε)) with ε ~ N(0, 1) for each pixel.

    It is the identity at first: the last convolution starts at zero. ``HypergradientCallback("augmentation")`` learns
    it under an :class:`ImageClassifier` with ``augmentation=AugmentationNetwork()``; trained by the training loss it
    would only make images easy. Without noise channel an image is always changed in the same way, which is no
    augmentation. 15 k parameters by default; every operation has a double backward.
    Ronneberger, Fischer & Brox (2015), MICCAI; as hyperparameters: Lorraine, Vicol & Duvenaud (2020), AISTATS.

    Args:
        channels: Channels of an image.
        width: Channels of the first level; the two below have two and four times as many.
        strength: s > 0, the largest change of a pixel.
        noise_channels: Channels of ε.

    Shape:
        Input and output ``(batch, channels, height, width)``, with sides of at least 4.

    Raises:
        ValueError: A size is below 1, or the strength is not positive.

    Example:
        >>> images = torch.rand(2, 1, 28, 28)
        >>> torch.equal(AugmentationNetwork()(images), images)
        True
    """

    def __init__(
        self, channels: int = 1, width: int = 8, strength: float = 1.0, noise_channels: int = 1
    ) -> None:
        super().__init__()
        at_least(1, channels=channels, width=width, noise_channels=noise_channels)
        positive(strength=strength)
        self.strength, self.noise_channels = strength, noise_channels
        sizes = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(
            _convolution(a, b) for a, b in zip((channels + noise_channels, *sizes), sizes, strict=False)
        )
        self.up = nn.ModuleList(
            _convolution(a + b, b) for a, b in ((sizes[2], sizes[1]), (sizes[1], sizes[0]))
        )
        self.out = _convolution(width, channels)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Return augmented images, other ones in each call."""
        shape = (len(images), self.noise_channels, *images.shape[2:])
        x = torch.cat([images, torch.randn(shape, dtype=images.dtype, device=images.device)], 1)
        kept = []
        for i, convolution in enumerate(self.down):
            x = gelu(convolution(x if i == 0 else avg_pool2d(x, 2)))
            kept.append(x)
        for convolution, skip in zip(self.up, kept[-2::-1], strict=True):
            x = gelu(convolution(torch.cat([interpolate(x, skip.shape[2:]), skip], 1)))
        return images + self.strength * torch.tanh(self.out(x))


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
