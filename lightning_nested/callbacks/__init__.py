"""Callbacks for an existing Trainer."""

from lightning_nested.callbacks.game_spectrum import GameSpectrumCallback
from lightning_nested.callbacks.generative_metrics.callback import GenerativeMetrics
from lightning_nested.callbacks.generative_metrics.evaluators import (
    ClassifierEvaluator,
    Evaluator,
    InceptionEvaluator,
    ModuleEvaluator,
)
from lightning_nested.callbacks.generative_metrics.scores import ScoreOptions
from lightning_nested.callbacks.generator_ema import GeneratorEMA
from lightning_nested.callbacks.hypergradient import HypergradientCallback
from lightning_nested.callbacks.lyapunov import LyapunovCallback
from lightning_nested.callbacks.retrain_check import RetrainCheck
from lightning_nested.callbacks.sample_grid import SampleGrid

__all__ = [
    "ClassifierEvaluator",
    "Evaluator",
    "GameSpectrumCallback",
    "GenerativeMetrics",
    "GeneratorEMA",
    "HypergradientCallback",
    "InceptionEvaluator",
    "LyapunovCallback",
    "ModuleEvaluator",
    "RetrainCheck",
    "SampleGrid",
    "ScoreOptions",
]
