"""Layers whose weights respond to hyperparameters."""

from lightning_nested.hypernetworks.layers.base import HyperLayer, RowResponse
from lightning_nested.hypernetworks.layers.conv import HyperConv1d, HyperConv2d
from lightning_nested.hypernetworks.layers.embedding import HyperEmbedding
from lightning_nested.hypernetworks.layers.linear import HyperLinear
from lightning_nested.hypernetworks.layers.lstm import HyperLSTM
from lightning_nested.hypernetworks.layers.norm import (
    HyperBatchNorm1d,
    HyperBatchNorm2d,
    HyperGroupNorm,
    HyperLayerNorm,
)

__all__ = [
    "HyperLayer",
    "RowResponse",
    "HyperConv1d",
    "HyperConv2d",
    "HyperEmbedding",
    "HyperLinear",
    "HyperLSTM",
    "HyperBatchNorm1d",
    "HyperBatchNorm2d",
    "HyperGroupNorm",
    "HyperLayerNorm",
]
