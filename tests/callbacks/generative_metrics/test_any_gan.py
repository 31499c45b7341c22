"""Scores and grids of GANModules that are no BigGAN: points, pictures of any shape, plain loaders, no labels."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_nested.callbacks import (
    ClassifierEvaluator,
    GenerativeMetrics,
    GeneratorEMA,
    ModuleEvaluator,
    SampleGrid,
    ScoreOptions,
    ValuesEvaluator,
)
from lightning_nested.modules import GANModule
from tests.trainers import trainer

POINTS = torch.randn(120, 2, generator=torch.Generator().manual_seed(0)) + 3


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def points_gan(**options: Any) -> GANModule:
    torch.manual_seed(0)
    return GANModule(nn.Linear(3, 2), nn.Linear(2, 1), latent_dim=3, optimizer=sgd, **options)


def pictures_gan(shape: tuple[int, int, int], **options: Any) -> GANModule:
    torch.manual_seed(0)
    size = int(np.prod(shape))
    generator = nn.Sequential(nn.Linear(3, size), nn.BatchNorm1d(size), nn.Tanh(), nn.Unflatten(1, shape))
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(size, 1))
    return GANModule(generator, discriminator, latent_dim=3, optimizer=sgd, **options)


def only(found: dict[str, float]) -> dict[str, float]:
    return {name.split("/")[0]: value for name, value in found.items()}


def nearest(a: Tensor, b: Tensor, k: int) -> float:
    """Share of rows of b that lie within the k-th neighbour's distance of some row of a."""
    radius = torch.cdist(a, a).sort(dim=1).values[:, k]
    return (torch.cdist(b, a) <= radius).any(dim=1).double().mean().item()


def test_the_readmes_gan_is_scored_at_the_end_by_one_line(tmp_path: Path) -> None:
    """No labels, no datamodule, no validation: each score against a formula on the same points."""
    gan = points_gan()
    gan.generator.bias.data.fill_(3.0)  # samples among the data
    scores = GenerativeMetrics(
        ValuesEvaluator(), num_samples=100, options=ScoreOptions(kernel_subsets=1, kernel_subset_size=100)
    )
    fit = trainer(scores, folder=tmp_path, max_epochs=-1, max_steps=7, logger=CSVLogger(tmp_path))
    fit.fit(gan, DataLoader(POINTS, batch_size=8, shuffle=True, drop_last=True))
    found = only(scores.last)
    fakes = gan.sample_for_metrics(
        torch.zeros(100), batch_norm="running", generator=torch.Generator().manual_seed(0)
    )
    a, b = POINTS.double().numpy(), fakes.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    frechet = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert found["frechet_distance"] == pytest.approx(frechet, rel=1e-5)
    # Precision and recall look at as many real points as there are samples: those whose hash comes first.
    assert scores._real is not None
    real = scores._real.features
    assert len(real) == 100
    assert 0.1 < found["recall"] < found["precision"]
    # Shares in float32.
    assert found["precision"] == pytest.approx(nearest(real, fakes, 3), abs=1e-6)
    assert found["recall"] == pytest.approx(nearest(fakes, real, 3), abs=1e-6)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() @ y.double().T / 2 + 1) ** 3

    within = [(kernel(t, t).sum() - kernel(t, t).diagonal().sum()) / (100 * 99) for t in (real, fakes)]
    expected = within[0] + within[1] - 2 * kernel(real, fakes).mean()
    # torchmetrics sums in float32.
    assert found["kernel_distance"] == pytest.approx(expected.item(), rel=1e-3)
    assert set(found) == {"frechet_distance", "kernel_distance", "precision", "recall"}
    (line,) = (json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines())
    assert (line["game_updates"], line["real_images"]) == (7, 120)
    assert "guidance" not in line
    assert float(fit.callback_metrics["frechet_distance/values/train/100/running"]) == pytest.approx(frechet)
    logged = (Path(fit.logger.log_dir) / "metrics.csv").read_text()  # type: ignore[union-attr,arg-type]
    assert "frechet_distance/values/train/100/running" in logged


@pytest.mark.parametrize("shape", [(2, 5, 7), (4, 8, 8), (1, 9, 4)])
def test_pictures_of_any_shape(shape: tuple[int, int, int], tmp_path: Path) -> None:
    from PIL import Image

    pictures = torch.rand(50, *shape) * 2 - 1
    metrics = GenerativeMetrics(
        ModuleEvaluator(module=nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), label="pool"),
        num_samples=30, split="val", batch_norm=("running", "batch", "standing"),
        scores=("frechet", "precision_recall"),
    )  # fmt: skip
    fit = trainer(metrics, SampleGrid(2, per_class=3, gif=True), folder=tmp_path, max_epochs=1)
    fit.fit(pictures_gan(shape), DataLoader(pictures, batch_size=5), DataLoader(pictures, batch_size=10))
    assert Counter(name.split("/")[0] for name in metrics.last) == dict.fromkeys(
        ("frechet_distance", "precision", "recall"), 3
    )
    assert len({value for name, value in metrics.last.items() if name.startswith("frechet")}) == 3
    assert torch.isfinite(fit.callback_metrics["val_discriminator_loss"])
    channels, height, width = shape
    side_by_side = 1 if channels == 1 else channels
    grids = sorted((tmp_path / "grids").glob("*.png"))
    assert [path.stem for path in grids] == ["000002", "000004", "000005"]
    with Image.open(grids[0]) as grid:
        assert grid.size == (3 * (side_by_side * width + 1) + 1, 3 * (height + 1) + 1)
    with Image.open(tmp_path / "grids" / "samples.gif") as film:
        assert film.n_frames == 3  # type: ignore[attr-defined]


class Painter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.draw = nn.Linear(3, 16)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        # A class is a shade, so that a classifier can tell them.
        return 0.1 * self.draw(z).view(-1, 1, 4, 4) + (y.float().view(-1, 1, 1, 1) - 1)


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(x.flatten(1)) + y[:, None].float()


def test_classes_and_their_agreement(tmp_path: Path) -> None:
    """Images of 4 pixels a side, which three poolings would leave nothing of; samples are of three shades."""
    labels = torch.arange(90) % 3
    images = 0.05 * torch.randn(90, 1, 4, 4) + (labels.float().view(-1, 1, 1, 1) - 1)
    gan = GANModule(Painter(), Judge(), latent_dim=3, num_classes=3, optimizer=sgd)
    metrics = GenerativeMetrics(
        ClassifierEvaluator(epochs=30, width=4, num_features=4, batch_size=10), num_samples=30,
        split="val", scores=("agreement",),
    )  # fmt: skip
    loader = DataLoader(TensorDataset(images, labels), batch_size=30)
    trainer(metrics, folder=tmp_path).validate(gan, loader, verbose=False)
    found = only(metrics.last)
    assert found["agreement"] == pytest.approx(sum(found[f"agreement_class_{k}"] for k in range(3)) / 3)
    assert found["agreement"] > 0.9


@pytest.mark.parametrize("kind", ["labelled", "targets", "dict"])
def test_what_stands_beside_the_data_does_not_matter_without_classes(kind: str, tmp_path: Path) -> None:
    class Named(GANModule):
        def real_data(self, batch: Any) -> tuple[Tensor, Tensor | None]:
            return super().real_data(batch["x"] if isinstance(batch, dict) else batch)

    datasets: dict[str, Any] = {
        "labelled": TensorDataset(POINTS, torch.arange(120)),
        "targets": TensorDataset(POINTS, torch.randn(120, 4)),
        "dict": [{"x": x} for x in POINTS],
    }
    torch.manual_seed(0)
    gan = Named(nn.Linear(3, 2), nn.Linear(2, 1), latent_dim=3, optimizer=sgd)
    metrics = GenerativeMetrics(ValuesEvaluator(), num_samples=20, split="val", scores=("frechet",))
    trainer(metrics, folder=tmp_path).validate(gan, DataLoader(datasets[kind], batch_size=16), verbose=False)
    (value,) = metrics.last.values()
    plain = GenerativeMetrics(ValuesEvaluator(), num_samples=20, split="val", scores=("frechet",))
    trainer(plain, folder=tmp_path).validate(points_gan(), DataLoader(POINTS, batch_size=7), verbose=False)
    assert value == pytest.approx(next(iter(plain.last.values())), rel=1e-6)
    # Statistics are kept by the data alone.
    assert len(list((tmp_path / "metrics_cache").glob("real_*.pt"))) == 1


def test_a_loader_that_shares_data_among_processes_is_read_as_a_whole(tmp_path: Path) -> None:
    sampler = DistributedSampler(POINTS, num_replicas=2, rank=1)  # type: ignore[arg-type]
    loader: DataLoader[Tensor] = DataLoader(POINTS, batch_size=8, sampler=sampler)  # type: ignore[arg-type]
    metrics = GenerativeMetrics(ValuesEvaluator(), num_samples=20, split="val", scores=("frechet",))
    trainer(metrics, folder=tmp_path).validate(points_gan(), loader, verbose=False)
    assert metrics._real is not None
    assert metrics._real.count == 120


def test_the_average_is_scored_at_the_end_and_training_goes_on_the_same(tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> tuple[GANModule, GeneratorEMA]:
        gan, ema = pictures_gan((1, 8, 8)), GeneratorEMA(0.5, start=0)
        pictures = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        fit = trainer(ema, *callbacks, folder=tmp_path, max_epochs=-1, max_steps=6)
        fit.fit(gan, DataLoader(pictures, batch_size=4, shuffle=True))
        return gan, ema

    metrics = GenerativeMetrics(
        ModuleEvaluator(module=nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), label="pool"),
        num_samples=20, scores=("frechet",),
    )  # fmt: skip
    plain, watched = run()[0], run(metrics, SampleGrid(1))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched[0].state_dict()[name]), name
    gan, ema = watched
    (value,) = metrics.last.values()
    gan.generator.load_state_dict(ema.averaged().state_dict())
    samples = gan.sample_for_metrics(
        torch.zeros(20), batch_norm="running", generator=torch.Generator().manual_seed(0)
    )
    fakes = nn.functional.adaptive_avg_pool2d(samples, 2).flatten(1).double().numpy()
    assert metrics._real is not None
    real = metrics._real
    mean = (real.total / real.count).numpy()
    covariance = (real.products.numpy() - real.count * np.outer(mean, mean)) / (real.count - 1)
    root = scipy.linalg.sqrtm(covariance @ np.cov(fakes.T)).real
    expected = np.square(mean - fakes.mean(0)).sum() + np.trace(covariance + np.cov(fakes.T) - 2 * root)
    assert value == pytest.approx(expected, rel=1e-4)


def test_batch_norm_of_a_sample_is_what_was_asked_for() -> None:
    gan = pictures_gan((1, 2, 2))
    norm = gan.generator[1]
    norm.running_mean.fill_(5.0)  # type: ignore[union-attr,operator]
    before = {name: value.clone() for name, value in gan.state_dict().items()}

    def mean(mode: str, count: int = 101) -> float:
        generator = torch.Generator().manual_seed(0)
        samples = gan.sample_for_metrics(torch.zeros(count), batch_norm=mode, generator=generator)
        assert samples.shape == (count, 1, 2, 2)
        return samples.mean().item()

    assert mean("running") < -0.9
    assert abs(mean("batch")) < 0.1  # 101 in two batches of about 50, none of one example
    assert abs(mean("standing")) < 0.1
    assert gan.sample_for_metrics(torch.zeros(0), batch_norm="batch", generator=torch.Generator()).shape == (
        0,
        1,
        2,
        2,
    )
    for name, value in gan.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert norm.training


@pytest.mark.parametrize(
    ("options", "data", "match"),
    [
        ({}, {"val": 1}, r"split='train'\) compares with .* Got no train loader, and val ones"),
        ({"scores": ("agreement",), "split": "val"}, {"val": 1}, "Got an unconditional GANModule"),
        ({"split": "val"}, {"val": 2}, r"one val loader. Got a list; give one DataLoader"),
    ],
)
def test_refusals(options: Any, data: dict[str, int], match: str, tmp_path: Path) -> None:
    loaders = [DataLoader(POINTS, batch_size=8)] * data["val"]
    metrics = GenerativeMetrics(ValuesEvaluator(), num_samples=20, **options)
    with pytest.raises(MisconfigurationException, match=match):
        trainer(metrics, folder=tmp_path).validate(points_gan(), loaders, verbose=False)


def test_points_are_no_grid(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"Got samples of shape \(64, 2\); leave it out"):
        trainer(SampleGrid(1), folder=tmp_path, max_epochs=-1, max_steps=1).fit(
            points_gan(), DataLoader(POINTS)
        )


def test_a_classifier_needs_labelled_images(tmp_path: Path) -> None:
    metrics = GenerativeMetrics(ClassifierEvaluator(), num_samples=20, split="val", scores=("frechet",))
    for batch, match in (
        (POINTS, r"need batches \(images, labels, …\)"),
        (TensorDataset(POINTS, torch.zeros(120, dtype=torch.long)), r"images \(N, C, H, W\). Got \(120, 2\)"),
    ):
        with pytest.raises(ValueError, match=match):
            trainer(metrics, folder=tmp_path).validate(points_gan(), DataLoader(batch), verbose=False)  # type: ignore[arg-type]
