"""Scores of points, tables and other small data, in which a distance of the numbers themselves has a meaning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.callbacks.generative_metrics.evaluators import (
    Batches,
    Evaluator,
    FeatureExtractor,
    one_example,
)


@checked
@dataclass(frozen=True, kw_only=True)
class ValuesEvaluator(Evaluator):
    """Evaluator whose features are the data's own numbers, flattened: for points, tables and other small data.

    The distance of pictures' pixels says little; use ``InceptionEvaluator()`` or ``ClassifierEvaluator()`` for them.
    """

    @property
    @override
    def name(self) -> str:
        return "values"

    @override
    def build(self, train: Batches, cache: Path) -> FeatureExtractor:
        return _Values(one_example(train).numel())


class _Values(FeatureExtractor):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features, self.fingerprint = num_features, f"values-{num_features}"

    def forward(self, data: Tensor) -> tuple[Tensor, None]:
        return data.flatten(1), None
