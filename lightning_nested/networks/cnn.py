"""Small convolutional network for images."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_nested.arguments import at_least, checked

# Side of the last feature map: keeps positions, and any input of 8×8 or more fits.
_POOLED = 4


@checked
class SmallCNN(nn.Module):
    """Network of two 3×3 convolutions, a 4×4 average pool and a linear layer; 10 k parameters by default.

    Every operation has a double backward, so Hessian products and hypergradients go through it.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        num_classes: width of the output.
        width: channels of the first convolution; the second has twice as many.
        batch_norm: normalize after each convolution (the convolution then has no bias).

    Shape:
        Input ``(batch, in_channels, height, width)`` with sides of at least 8.
        Output ``(batch, num_classes)``.

    Example:
        >>> import torch
        >>> tuple(SmallCNN(in_channels=3)(torch.zeros(2, 3, 32, 32)).shape)
        (2, 10)
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, width: int = 16, batch_norm: bool = False
    ) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, num_classes=num_classes, width=width)
        self.features = nn.Sequential(
            *_block(in_channels, width, batch_norm),
            nn.MaxPool2d(2),
            *_block(width, 2 * width, batch_norm),
            nn.AdaptiveAvgPool2d(_POOLED),
        )
        self.classifier = nn.Linear(2 * width * _POOLED**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def _block(in_channels: int, out_channels: int, batch_norm: bool) -> list[nn.Module]:
    # The shift of a BatchNorm makes the convolution's bias a direction without curvature: a singular Hessian.
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=not batch_norm)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(out_channels))
    return [*layers, nn.ReLU()]
