"""Networks that the modules train. PyTorch only."""

from lightning_nested.networks.by_name import build_network
from lightning_nested.networks.cnn import SmallCNN
from lightning_nested.networks.mlp import MLP

__all__ = [
    "MLP",
    "SmallCNN",
    "build_network",
]
