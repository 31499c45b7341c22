"""HypergradientCallback, its refusals, and one hypergradient of it."""

from lightning_nested.callbacks.hypergradient.callback import HypergradientCallback

__all__ = ["HypergradientCallback"]
