"""LightningModules to train as they are or to extend."""

from lightning_nested.anneal import Anneal
from lightning_nested.hypernetworks.loops import STN, DeltaSTN, Global, Local, ResponseLoop, Simplified
from lightning_nested.modules.actor_critic import ActorCritic
from lightning_nested.modules.augmented_lagrangian import AugmentedLagrangian
from lightning_nested.modules.distillation import DistillationModule
from lightning_nested.modules.game.loop import GameLoop
from lightning_nested.modules.game.module import GameModule
from lightning_nested.modules.gan.biggan import BigGAN
from lightning_nested.modules.gan.biggan_options import BigGANNetworks, BigGANObjective, Execution, Sampling
from lightning_nested.modules.gan.module import GANModule
from lightning_nested.modules.hypernetwork.module import HypernetworkModule
from lightning_nested.modules.hypernetwork.options import ResponseMonitor, ResponseOptions
from lightning_nested.modules.image_classifier import ImageClassifier
from lightning_nested.modules.language import LanguageModel
from lightning_nested.modules.nested.module import NestedModule
from lightning_nested.modules.nested.strategies import GradientStrategy, Implicit, LoopOptions, Unrolled
from lightning_nested.modules.tuned_classifier import TunedImageClassifier
from lightning_nested.networks.adversarial import (
    R1,
    R2,
    AdversarialLoss,
    DiffAugment,
    GradientPenalty,
    GradientRegularizer,
    Hinge,
    NonSaturating,
    RelativisticPairing,
    Wasserstein,
)

__all__ = [
    "ActorCritic",
    "AdversarialLoss",
    "Anneal",
    "AugmentedLagrangian",
    "BigGAN",
    "BigGANNetworks",
    "BigGANObjective",
    "DeltaSTN",
    "DiffAugment",
    "DistillationModule",
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
    "LanguageModel",
    "Local",
    "LoopOptions",
    "NestedModule",
    "NonSaturating",
    "R1",
    "R2",
    "RelativisticPairing",
    "ResponseLoop",
    "ResponseMonitor",
    "ResponseOptions",
    "STN",
    "Sampling",
    "Simplified",
    "TunedImageClassifier",
    "Unrolled",
    "Wasserstein",
]
