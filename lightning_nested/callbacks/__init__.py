"""Callbacks for an existing Trainer."""

from lightning_nested.callbacks.evaluators import (
    ClassifierEvaluator,
    Evaluator,
    InceptionEvaluator,
    ModuleEvaluator,
)
from lightning_nested.callbacks.generative_metrics import GenerativeMetrics, ScoreOptions
from lightning_nested.callbacks.generator_ema import GeneratorEMA
from lightning_nested.callbacks.hypergradient import HypergradientCallback
from lightning_nested.callbacks.label_noise_report import LabelNoiseReport
from lightning_nested.callbacks.sample_grid import SampleGrid

__all__ = [
    "ClassifierEvaluator",
    "Evaluator",
    "GenerativeMetrics",
    "GeneratorEMA",
    "HypergradientCallback",
    "InceptionEvaluator",
    "LabelNoiseReport",
    "ModuleEvaluator",
    "SampleGrid",
    "ScoreOptions",
]
