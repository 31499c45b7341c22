"""Scores of generated images: Fréchet and kernel distance, inception score, precision and recall of features."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_nested.arguments import at_least, checked
from lightning_nested.callbacks.generative_metrics.real_statistics import RealStatistics
from lightning_nested.extras import require_package

Score = Literal["frechet", "kernel", "inception_score", "precision_recall", "agreement"]
BatchNormMode = Literal["running", "batch", "standing"]


@checked
@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Details of the scores.

    Args:
        kernel_subsets: Random subsets of the kernel distance.
        kernel_subset_size: Images in each; at most the number of samples.
        inception_splits: Parts that the Inception Score is averaged over.
        neighborhood: k of precision and recall.
    """

    kernel_subsets: int = 100
    kernel_subset_size: int = 1000
    inception_splits: int = 10
    neighborhood: int = 3

    def __post_init__(self) -> None:
        at_least(1, **vars(self))


# ---- the libraries' scores, from the features of all processes. Process 0 alone computes them, so no metric may
# synchronize: it would wait for the others forever.


class _Given(nn.Identity):
    """Extractor for the libraries that returns its input: it is given features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: RealStatistics, features: Tensor) -> float:
    """Return ‖μ_r − μ_f‖² + tr(Σ_r + Σ_f − 2(Σ_r Σ_f)^½) by torchmetrics, in float64.

    Args:
        real: Sums over the real images.
        features: ``(N, F)`` of the generated ones.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(features.shape[1]), sync_on_compute=False)
    metric.real_features_sum, metric.real_features_cov_sum = real.total, real.products
    metric.real_features_num_samples = torch.tensor(real.count)
    metric.update(features, real=False)
    return float(metric.compute())


def kernel_distance(real: Tensor, features: Tensor, options: ScoreOptions) -> float:
    """Return the squared maximum mean discrepancy of a cubic kernel by torchmetrics, mean over random subsets."""
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Metric `Kernel Inception Distance` will save all extracted features"
        )
        size = min(options.kernel_subset_size, len(real), len(features))
        extractor = _Given(features.shape[1])
        metric = KernelInceptionDistance(
            feature=extractor, subsets=options.kernel_subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(real, real=True)
    metric.update(features, real=False)
    return float(metric.compute()[0])


def inception_score(logits: Tensor, options: ScoreOptions) -> float:
    """Return exp E KL(p(y|x) ‖ p(y)) by torchmetrics, mean over splits."""
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `InceptionScore` will save all extracted features")
        metric = InceptionScore(
            feature=_Given(logits.shape[1]), splits=options.inception_splits, sync_on_compute=False
        )
        metric.update(logits)
        # The standard deviation over splits, which is not used, is not defined for one split.
        warnings.filterwarnings("ignore", "std")
        return float(metric.compute()[0])


def precision_recall(real: Tensor, features: Tensor, options: ScoreOptions) -> dict[str, float]:
    """Return the share of samples inside the real manifold, and the reverse, by torch-fidelity."""
    require_package("torch_fidelity")
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(
        features,
        real,
        prc_neighborhood=options.neighborhood,
        prc_batch_size=10_000,
        save_cpu_ram=True,
        verbose=False,
    )
    return {"precision": float(found["precision"]), "recall": float(found["recall"])}
