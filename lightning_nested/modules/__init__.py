"""LightningModules to train as they are or to extend."""

from lightning_nested.modules.game import GameModule
from lightning_nested.modules.game_loop import GameLoop
from lightning_nested.modules.image_classifier import ImageClassifier
from lightning_nested.modules.nested import NestedModule
from lightning_nested.modules.strategies import GradientStrategy, Implicit, LoopOptions, Unrolled

__all__ = [
    "GameLoop",
    "GameModule",
    "GradientStrategy",
    "ImageClassifier",
    "Implicit",
    "LoopOptions",
    "NestedModule",
    "Unrolled",
]
