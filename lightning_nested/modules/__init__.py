"""LightningModules to train as they are or to extend."""

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

__all__ = [
    "DeltaSTN",
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
]
