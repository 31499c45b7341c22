"""Residual networks and AlexNet for images of 32×32 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import relu

from lightning_nested.arguments import at_least, checked, fraction


@checked
class CIFARResNet(nn.Module):
    """Residual network for small images: a 3×3 convolution without pooling first, then stages of basic blocks.

    By default ResNet-18, 11 M weights. ``blocks=(7, 7, 7), width=16`` is ResNet-44 of the paper's CIFAR-10 experiments,
    0.66 M weights; where channels change, its shortcut is a 1×1 convolution.
    He, Zhang, Ren & Sun (2016), CVPR, "Deep residual learning for image recognition".

    Args:
        in_channels: 1 for grey images, 3 for colour.
        num_classes: Width of the output.
        blocks: Blocks of each stage. A stage halves the sides of the images, but for the first.
        width: Channels of the first stage; each further one has twice as many.

    Shape:
        Input ``(batch, in_channels, height, width)``. Output ``(batch, num_classes)``.

    Example:
        >>> import torch
        >>> tuple(CIFARResNet(blocks=(1, 1), width=4)(torch.zeros(2, 3, 32, 32)).shape)
        (2, 10)
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        blocks: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
    ) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, num_classes=num_classes, blocks=blocks, width=width)
        layers, channels = [_convolution(in_channels, width), nn.BatchNorm2d(width), nn.ReLU()], width
        for stage, count in enumerate(blocks):
            for block in range(count):
                outputs = width * 2**stage
                layers.append(_Block(channels, outputs, 2 if stage > 0 and block == 0 else 1))
                channels = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


class _Block(nn.Module):
    """x ↦ relu(F(x) + shortcut(x)), with F of two normalized 3×3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(inputs, outputs, stride), _convolution(outputs, outputs)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inside = relu(self.norms[0](self.first(x)))
        return relu(self.norms[1](self.second(inside)) + self.shortcut(x))


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


@checked
class CIFARAlexNet(nn.Module):
    """AlexNet with 3×3 convolutions for images of 32×32: five convolutions, three pools, three linear layers.

    23 M weights by default. Krizhevsky, Sutskever & Hinton (2012), NeurIPS.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        num_classes: Width of the output.
        width: Channels of the first convolution; the others are in the proportions of the paper.
        hidden: Width of both hidden linear layers.
        dropout: Probability of dropping an input of each of them in train mode.

    Shape:
        Input ``(batch, in_channels, height, width)`` with sides of at least 16. Output ``(batch, num_classes)``.

    Example:
        >>> import torch
        >>> tuple(CIFARAlexNet(width=2, hidden=8)(torch.zeros(2, 3, 32, 32)).shape)
        (2, 10)
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        width: int = 64,
        hidden: int = 4096,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, num_classes=num_classes, width=width, hidden=hidden)
        fraction(dropout=dropout)
        sizes = (in_channels, width, 3 * width, 6 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2 if i == 0 else 1, padding=1), nn.ReLU()]
            if i in (0, 1, 4):
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(16 * width, hidden), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        logits: Tensor = self.classifier(self.features(x))
        return logits
