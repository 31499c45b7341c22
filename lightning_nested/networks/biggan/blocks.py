"""Residual blocks and self-attention of BigGAN."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.networks.conditional_batch_norm import ConditionalBatchNorm2d
from lightning_nested.networks.spectral_norm import SpectralNormConv2d

MakeNorm = Callable[[int], ConditionalBatchNorm2d]


def attention_layers(sides: Sequence[int], known: Sequence[int], channels: Sequence[int]) -> nn.ModuleDict:
    """Return self-attention by index of the block it follows: the first block whose output has that side.

    Args:
        sides: Sides with attention.
        known: Side of each block's output.
        channels: Input channels of the first block, then the output of each.
    """
    unknown = [side for side in sides if side not in known]
    if unknown:
        raise ValueError(f"attention must name sides of block outputs, {sorted(set(known))}. Got {unknown}.")
    blocks = [known.index(side) for side in sides]
    return nn.ModuleDict({str(block): SelfAttention(channels[block + 1]) for block in blocks})


class GeneratorBlock(nn.Module):
    """Residual block: conditional norm, ReLU, nearest up-sampling ×2, 3×3, norm, ReLU, 3×3; 1×1 shortcut.

    The reference up-samples the shortcut first; a 1×1 convolution commutes with copying pixels, so it comes
    first here, on a quarter of them.
    """

    def __init__(self, in_channels: int, out_channels: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels)
        self.conv1 = SpectralNormConv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(out_channels)
        self.conv2 = SpectralNormConv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = SpectralNormConv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map ``(N, in, H, W)`` to ``(N, out, 2H, 2W)``."""
        h = functional.interpolate(functional.relu(self.norm1(x, condition)), scale_factor=2)
        h = functional.relu(self.norm2(self.conv1(h), condition))
        return torch.add(self.conv2(h), functional.interpolate(self.shortcut(x), scale_factor=2))


class DiscriminatorBlock(nn.Module):
    """Residual block: [ReLU,] 3×3, ReLU, 3×3[, average pool], plus a 1×1 shortcut where the shape changes.

    Pooling commutes with a 1×1 convolution, so the shortcut pools first, whichever order the reference has.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of both convolutions.
        preactivate: Begin with a ReLU; False for the block that sees the image.
        downsample: Halve the side.
    """

    def __init__(self, in_channels: int, out_channels: int, *, preactivate: bool, downsample: bool) -> None:
        super().__init__()
        self.preactivate, self.downsample = preactivate, downsample
        self.conv1 = SpectralNormConv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = SpectralNormConv2d(out_channels, out_channels, 3, padding=1)
        changed = downsample or in_channels != out_channels
        self.shortcut = SpectralNormConv2d(in_channels, out_channels, 1) if changed else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in, H, W)`` to ``(N, out, H', W')``."""
        # Not in place: the shortcut needs what comes before the ReLU.
        h = self.conv1(functional.relu(x) if self.preactivate else x)
        h = self.conv2(functional.relu(h))
        if self.downsample:
            h, x = functional.avg_pool2d(h, 2), functional.avg_pool2d(x, 2)
        return torch.add(h, x if self.shortcut is None else self.shortcut(x))


class SelfAttention(nn.Module):
    """Self-attention x + γ · o(g · softmax(θᵀφ)ᵀ); every position reads from max-pooled ones, γ starts at 0.

    Zhang, Goodfellow, Metaxas & Odena (2019), ICML, arXiv 1805.08318. Written with matrix products, not with
    the fused kernel, which has no double backward on CPU.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner, half = max(1, channels // 8), max(1, channels // 2)
        self.theta = SpectralNormConv2d(channels, inner, 1, bias=False)
        self.phi = SpectralNormConv2d(channels, inner, 1, bias=False)
        self.g = SpectralNormConv2d(channels, half, 1, bias=False)
        self.o = SpectralNormConv2d(half, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        theta = self.theta(x).flatten(2)
        phi = functional.max_pool2d(self.phi(x), 2).flatten(2)
        g = functional.max_pool2d(self.g(x), 2).flatten(2)
        weights = torch.softmax(theta.transpose(1, 2) @ phi, dim=-1)
        read = (g @ weights.transpose(1, 2)).reshape(len(x), -1, *x.shape[2:])
        attended: Tensor = self.o(read)
        return x + self.gamma * attended
