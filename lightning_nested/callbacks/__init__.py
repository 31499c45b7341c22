"""Callbacks for an existing Trainer."""

from lightning_nested.callbacks.anneal_optimizer import AnnealOptimizer
from lightning_nested.callbacks.game_spectrum import GameSpectrumCallback
from lightning_nested.callbacks.generative_metrics.callback import GenerativeMetrics
from lightning_nested.callbacks.generative_metrics.evaluators import (
    ClassifierEvaluator,
    Evaluator,
    InceptionEvaluator,
    ModuleEvaluator,
)
from lightning_nested.callbacks.generative_metrics.scores import ScoreOptions
from lightning_nested.callbacks.generative_metrics.values import ValuesEvaluator
from lightning_nested.callbacks.generator_ema import GeneratorEMA
from lightning_nested.callbacks.hypergradient import HypergradientCallback
from lightning_nested.callbacks.lookahead import Lookahead
from lightning_nested.callbacks.lyapunov import LyapunovCallback
from lightning_nested.callbacks.reproducibility_check import ReproducibilityCheck
from lightning_nested.callbacks.retrain_check import RetrainCheck
from lightning_nested.callbacks.sample_grid import SampleGrid

__all__ = [
    "AnnealOptimizer",
    "ClassifierEvaluator",
    "Evaluator",
    "GameSpectrumCallback",
    "GenerativeMetrics",
    "GeneratorEMA",
    "HypergradientCallback",
    "InceptionEvaluator",
    "Lookahead",
    "LyapunovCallback",
    "ModuleEvaluator",
    "ReproducibilityCheck",
    "RetrainCheck",
    "SampleGrid",
    "ScoreOptions",
    "ValuesEvaluator",
]
