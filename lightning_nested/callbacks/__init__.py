"""Callbacks for an existing Trainer."""

from lightning_nested.callbacks.hypergradient import HypergradientCallback

__all__ = ["HypergradientCallback"]
