"""Learned best responses: the trained weights as a function of the hyperparameters. PyTorch only."""

from lightning_nested.hypernetworks.convert import BestResponse, LowRankResponse, best_response
from lightning_nested.hypernetworks.dense import DenseResponse, FactorisedResponse
from lightning_nested.hypernetworks.diagonal import DiagonalResponse
from lightning_nested.hypernetworks.layers import (
    HyperConv1d,
    HyperConv2d,
    HyperEmbedding,
    HyperLayer,
    HyperLinear,
    HyperLSTM,
    RowResponse,
)
from lightning_nested.hypernetworks.perturbation import (
    FixedScale,
    GlobalNormal,
    GlobalUniform,
    LearnedScale,
    NoPerturbation,
    Perturbation,
)
from lightning_nested.hypernetworks.response import Response

__all__ = [
    "BestResponse",
    "DenseResponse",
    "DiagonalResponse",
    "FactorisedResponse",
    "FixedScale",
    "GlobalNormal",
    "GlobalUniform",
    "HyperConv1d",
    "HyperConv2d",
    "HyperEmbedding",
    "HyperLSTM",
    "HyperLayer",
    "HyperLinear",
    "LearnedScale",
    "LowRankResponse",
    "NoPerturbation",
    "Perturbation",
    "Response",
    "RowResponse",
    "best_response",
]
