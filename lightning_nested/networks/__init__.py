"""Networks for the modules to train. PyTorch only."""

from lightning_nested.networks.augmentation import AugmentationNetwork
from lightning_nested.networks.biggan.discriminator import Discriminator
from lightning_nested.networks.biggan.generator import Generator
from lightning_nested.networks.by_name import build_network
from lightning_nested.networks.cifar import CIFARAlexNet, CIFARResNet
from lightning_nested.networks.cnn import SmallCNN
from lightning_nested.networks.conditional_batch_norm import ConditionalBatchNorm2d, standing_statistics
from lightning_nested.networks.language import GPT, LanguageOutput, LSTMNetwork
from lightning_nested.networks.mlp import MLP
from lightning_nested.networks.sequence_dropout import SequenceDropout, WordDropout
from lightning_nested.networks.spectral_norm import (
    SpectralNormConv2d,
    SpectralNormEmbedding,
    SpectralNormLinear,
    frozen_power_iteration,
    singular_values,
)

__all__ = [
    "AugmentationNetwork",
    "CIFARAlexNet",
    "CIFARResNet",
    "ConditionalBatchNorm2d",
    "Discriminator",
    "GPT",
    "Generator",
    "LSTMNetwork",
    "LanguageOutput",
    "MLP",
    "SequenceDropout",
    "SmallCNN",
    "SpectralNormConv2d",
    "SpectralNormEmbedding",
    "SpectralNormLinear",
    "WordDropout",
    "build_network",
    "frozen_power_iteration",
    "singular_values",
    "standing_statistics",
]
