"""NestedModule: inner and outer steps, alternated in one training loop."""

from lightning_nested.modules.nested.module import NestedModule
from lightning_nested.modules.nested.strategies import GradientStrategy, Implicit, LoopOptions, Unrolled

__all__ = [
    "NestedModule",
    "GradientStrategy",
    "Implicit",
    "LoopOptions",
    "Unrolled",
]
