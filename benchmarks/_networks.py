"""Small networks of every common kind, each with one batch that two cores differentiate in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, Tensor, Tensor]  # a network, its inputs and its labels: of a mean cross-entropy


class Attention(nn.Module):
    """A pre-norm block of attention and an MLP, in operations that can be differentiated twice."""

    def __init__(self, width: int, heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) → the same."""
        batch, tokens, width = x.shape
        parts = self.qkv(self.norms[0](x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = parts[0] @ parts[1].transpose(-1, -2) * (width // self.heads) ** -0.5
        if self.causal:
            future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        seen = scores.softmax(-1) @ parts[2]
        x = x + self.out(seen.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """Four blocks of width 256 on 64 tokens, 3.7 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(1000, 256), nn.Parameter(torch.randn(64, 256) / 50)
        self.blocks = nn.Sequential(*(Attention(256, 4) for _ in range(4)), nn.LayerNorm(256))
        self.head = nn.Linear(256, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens) → (batch, vocabulary, tokens)."""
        out: Tensor = self.head(self.blocks(self.tokens(x) + self.places)).transpose(1, 2)
        return out


def wide_mlp() -> Case:
    """784-1000-150-10 with tanh, batch 256."""
    net = nn.Sequential(nn.Linear(784, 1000), nn.Tanh(), nn.Linear(1000, 150), nn.Tanh(), nn.Linear(150, 10))
    return net, torch.randn(256, 784), torch.randint(10, (256,))


def mlp() -> Case:
    """784-500-500-10 with tanh, batch 256, as in ``one_hypergradient.py``."""
    net = nn.Sequential(nn.Linear(784, 500), nn.Tanh(), nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 10))
    return net, torch.randn(256, 784), torch.randint(10, (256,))


def group_norm() -> Case:
    """Five convolutions with GroupNorm and SiLU on 32-pixel images, batch 16."""
    layers: list[nn.Module] = []
    for fan_in, fan_out, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, stride, 1), nn.GroupNorm(8, fan_out), nn.SiLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return net, torch.randn(16, 3, 32, 32), torch.randint(10, (16,))


def gpt() -> Case:
    """Batch 4 of 64 tokens."""
    x = torch.randint(1000, (4, 65))
    return GPT(), x[:, :-1], x[:, 1:]


class ViT(nn.Module):
    """Six blocks of width 192 on the 64 patches of a 32-pixel image, 2.7 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, 192, 4, 4), nn.Parameter(torch.randn(64, 192) / 50)
        self.blocks = nn.Sequential(*(Attention(192, 3, causal=False) for _ in range(6)), nn.LayerNorm(192))
        self.head = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) → (batch, 10)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        out: Tensor = self.head(self.blocks(tokens).mean(1))
        return out


class LSTM(nn.Module):
    """A language model of two layers of width 256, 2.1 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm = nn.Embedding(2000, 256), nn.LSTM(256, 256, 2, batch_first=True)
        self.head = nn.Linear(256, 2000)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens) → (batch, vocabulary, tokens)."""
        out: Tensor = self.head(self.lstm(self.tokens(x))[0]).transpose(1, 2)
        return out


def vit() -> Case:
    """Batch 8."""
    return ViT(), torch.randn(8, 3, 32, 32), torch.randint(10, (8,))


def lstm() -> Case:
    """Batch 16 of 16 tokens."""
    x = torch.randint(2000, (16, 17))
    return LSTM(), x[:, :-1], x[:, 1:]


def resnet18() -> Case:
    """torchvision's, 11.2 million weights, on 32-pixel images, batch 32."""
    from torchvision.models import resnet18

    return resnet18(num_classes=10), torch.randn(32, 3, 32, 32), torch.randint(10, (32,))


NETWORKS: dict[str, Callable[[], Case]] = {
    "MLP": wide_mlp,
    "GroupNorm": group_norm,
    "ResNet-18": resnet18,
    "LSTM": lstm,
    "GPT": gpt,
    "ViT": vit,
}
