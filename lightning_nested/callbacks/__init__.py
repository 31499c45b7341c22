"""Lightning callbacks."""

from lightning_nested.callbacks.generator_ema import GeneratorEMA
from lightning_nested.callbacks.hypergradient import HypergradientCallback
from lightning_nested.callbacks.label_noise_report import LabelNoiseReport

__all__ = [
    "GeneratorEMA",
    "HypergradientCallback",
    "LabelNoiseReport",
]
