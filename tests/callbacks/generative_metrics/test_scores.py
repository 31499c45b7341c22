import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from lightning_nested.callbacks import (
    ScoreOptions,
)
from lightning_nested.callbacks.generative_metrics.real_statistics import RealStatistics
from lightning_nested.callbacks.generative_metrics.scores import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:You defined a `validation_step`", "ignore:.*sync_dist"
)


def statistics(features: Tensor) -> RealStatistics:
    wide = features.double()
    return RealStatistics(
        count=len(wide), total=wide.sum(0), products=wide.T @ wide, features=features, accuracy=float("nan")
    )


def test_frechet_distance_against_the_formula() -> None:
    real, fake = torch.randn(400, 5), 1.3 * torch.randn(300, 5) + 0.2
    a, b = real.double().numpy(), fake.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(statistics(real), fake) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(statistics(real), real) == pytest.approx(0, abs=1e-5)


def test_kernel_distance_against_the_formula() -> None:
    real, fake = torch.randn(40, 3), torch.randn(40, 3) + 1
    found = kernel_distance(real, fake, ScoreOptions(kernel_subsets=2, kernel_subset_size=40))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 3 + 1) ** 3

    within = [kernel(t, t).sum() - kernel(t, t).diagonal().sum() for t in (real, fake)]
    expected = (within[0] + within[1]) / (40 * 39) - 2 * kernel(real, fake).mean()
    assert found == pytest.approx(expected.item(), rel=1e-4)  # every subset is the whole set


def test_inception_score_of_certain_and_of_constant_predictions() -> None:
    certain = 100.0 * nn.functional.one_hot(torch.arange(1000) % 10, 10).float()
    assert inception_score(certain, ScoreOptions(inception_splits=2)) == pytest.approx(
        10, rel=0.05
    )  # a split is no exact tenth of each
    assert inception_score(torch.ones(100, 10), ScoreOptions()) == pytest.approx(1, rel=1e-5)


def test_precision_and_recall_tell_which_side_is_missing() -> None:
    real = torch.cat((torch.randn(100, 2), torch.randn(100, 2) + 50))
    half = torch.randn(200, 2)
    found = precision_recall(real, half, ScoreOptions())
    assert found["precision"] > 0.8  # every sample is like a real one
    assert 0.4 < found["recall"] < 0.55  # but half of the real ones are not made
