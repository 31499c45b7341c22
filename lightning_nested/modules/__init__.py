"""LightningModules to train as they are or to extend."""

from lightning_nested.modules.game import GameModule
from lightning_nested.modules.game_loop import GameLoop
from lightning_nested.modules.gan import GANModule
from lightning_nested.modules.hypernetwork import HypernetworkModule
from lightning_nested.modules.image_classifier import ImageClassifier
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
    "DeltaSTN",
    "GANModule",
    "GameLoop",
    "GameModule",
    "Global",
    "GradientStrategy",
    "HypernetworkModule",
    "ImageClassifier",
    "Implicit",
    "Local",
    "LoopOptions",
    "NestedModule",
    "ResponseLoop",
    "ResponseMonitor",
    "ResponseOptions",
    "STN",
    "Simplified",
    "TunedImageClassifier",
    "Unrolled",
    "ZooGame",
]
