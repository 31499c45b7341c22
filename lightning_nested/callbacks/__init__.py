"""Callbacks for an existing Trainer."""

from lightning_nested.callbacks.hypergradient import HypergradientCallback
from lightning_nested.callbacks.label_noise_report import LabelNoiseReport
from lightning_nested.callbacks.lyapunov import LyapunovCallback

__all__ = ["HypergradientCallback", "LabelNoiseReport", "LyapunovCallback"]
