"""Callbacks for an existing Trainer."""

from lightning_nested.callbacks.game_report import GameReport
from lightning_nested.callbacks.game_spectrum import GameSpectrumCallback
from lightning_nested.callbacks.hypergradient import HypergradientCallback
from lightning_nested.callbacks.label_noise_report import LabelNoiseReport
from lightning_nested.callbacks.lyapunov import LyapunovCallback
from lightning_nested.callbacks.mode_coverage import ModeCoverage

__all__ = [
    "GameReport",
    "GameSpectrumCallback",
    "HypergradientCallback",
    "LabelNoiseReport",
    "LyapunovCallback",
    "ModeCoverage",
]
