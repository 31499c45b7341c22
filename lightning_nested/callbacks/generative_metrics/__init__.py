"""Scores of a generator during training."""

from lightning_nested.callbacks.generative_metrics.callback import GenerativeMetrics
from lightning_nested.callbacks.generative_metrics.evaluators import (
    ClassifierEvaluator,
    Evaluator,
    InceptionEvaluator,
    ModuleEvaluator,
)
from lightning_nested.callbacks.generative_metrics.scores import ScoreOptions
from lightning_nested.callbacks.generative_metrics.values import ValuesEvaluator

__all__ = [
    "GenerativeMetrics",
    "ClassifierEvaluator",
    "Evaluator",
    "InceptionEvaluator",
    "ModuleEvaluator",
    "ScoreOptions",
    "ValuesEvaluator",
]
