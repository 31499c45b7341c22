"""LightningModules to train as they are or to extend."""

from lightning_nested.modules.adversarial import (
    R1,
    AdversarialLoss,
    DiffAugment,
    GradientPenalty,
    GradientRegularizer,
    Hinge,
    NonSaturating,
    Wasserstein,
)
from lightning_nested.modules.biggan import BigGAN
from lightning_nested.modules.biggan_options import BigGANNetworks, BigGANObjective, Execution, Sampling
from lightning_nested.modules.game import GameModule
from lightning_nested.modules.game_loop import GameLoop
from lightning_nested.modules.gan import GANModule
from lightning_nested.modules.image_classifier import ImageClassifier
from lightning_nested.modules.linear_decay import LinearDecay
from lightning_nested.modules.nested import NestedModule
from lightning_nested.modules.strategies import GradientStrategy, Implicit, LoopOptions, Unrolled
from lightning_nested.modules.zoo_game import ZooGame

__all__ = [
    "AdversarialLoss",
    "BigGAN",
    "BigGANNetworks",
    "BigGANObjective",
    "DiffAugment",
    "Execution",
    "GradientPenalty",
    "GradientRegularizer",
    "Hinge",
    "LinearDecay",
    "NonSaturating",
    "R1",
    "Sampling",
    "Wasserstein",
    "GANModule",
    "GameLoop",
    "GameModule",
    "GradientStrategy",
    "ImageClassifier",
    "Implicit",
    "LoopOptions",
    "NestedModule",
    "Unrolled",
    "ZooGame",
]
