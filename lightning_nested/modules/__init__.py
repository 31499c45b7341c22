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
from lightning_nested.modules.hypernetwork import HypernetworkModule
from lightning_nested.modules.image_classifier import ImageClassifier
from lightning_nested.modules.linear_decay import LinearDecay
from lightning_nested.modules.nested import NestedModule
from lightning_nested.modules.response_loops import (
    STN,
    DeltaSTN,
    Global,
    Local,
    ResponseLoop,
    Simplified,
)
from lightning_nested.modules.response_monitor import ResponseMonitor, ResponseOptions
from lightning_nested.modules.strategies import GradientStrategy, Implicit, LoopOptions, Unrolled
from lightning_nested.modules.tuned_classifier import TunedImageClassifier
from lightning_nested.modules.zoo_game import ZooGame

__all__ = [
    "AdversarialLoss",
    "BigGAN",
    "BigGANNetworks",
    "BigGANObjective",
    "DeltaSTN",
    "DiffAugment",
    "Execution",
    "GANModule",
    "GameLoop",
    "GameModule",
    "Global",
    "GradientPenalty",
    "GradientRegularizer",
    "GradientStrategy",
    "Hinge",
    "HypernetworkModule",
    "ImageClassifier",
    "Implicit",
    "LinearDecay",
    "Local",
    "LoopOptions",
    "NestedModule",
    "NonSaturating",
    "R1",
    "ResponseLoop",
    "ResponseMonitor",
    "ResponseOptions",
    "STN",
    "Sampling",
    "Simplified",
    "TunedImageClassifier",
    "Unrolled",
    "Wasserstein",
    "ZooGame",
]
