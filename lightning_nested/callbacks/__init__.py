"""Callbacks for an existing Trainer."""

from lightning_nested.callbacks.evaluators import (
    ClassifierEvaluator,
    Evaluator,
    InceptionEvaluator,
    ModuleEvaluator,
)
from lightning_nested.callbacks.game_report import GameReport
from lightning_nested.callbacks.game_spectrum import GameSpectrumCallback
from lightning_nested.callbacks.generative_metrics import GenerativeMetrics, ScoreOptions
from lightning_nested.callbacks.generator_ema import GeneratorEMA
from lightning_nested.callbacks.hypergradient import HypergradientCallback
from lightning_nested.callbacks.label_noise_report import LabelNoiseReport
from lightning_nested.callbacks.lyapunov import LyapunovCallback
from lightning_nested.callbacks.mode_coverage import ModeCoverage
from lightning_nested.callbacks.sample_grid import SampleGrid

__all__ = [
    "ClassifierEvaluator",
    "Evaluator",
    "GameReport",
    "GameSpectrumCallback",
    "GenerativeMetrics",
    "GeneratorEMA",
    "HypergradientCallback",
    "InceptionEvaluator",
    "LabelNoiseReport",
    "LyapunovCallback",
    "ModeCoverage",
    "ModuleEvaluator",
    "SampleGrid",
    "ScoreOptions",
]
