import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_nested.callbacks import (
    GenerativeMetrics,
    GeneratorEMA,
    ModuleEvaluator,
    SampleGrid,
    ScoreOptions,
)
from lightning_nested.callbacks.generative_metrics.evaluators import content_hash, to_bytes
from lightning_nested.modules import BigGAN, BigGANNetworks, Sampling
from lightning_nested.modules.gan.sampling import seeded
from tests.modules.gan.tiny import data, module, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:You defined a `validation_step`", "ignore:.*sync_dist"
)


class Pool(nn.Module):
    """Six features of an image: the mean and the spread of each channel."""

    def __init__(self, logits: bool = False) -> None:
        super().__init__()
        self.logits, self.calls = logits, 0

    def forward(self, images: Tensor) -> Any:
        self.calls += 1
        features = torch.cat((images.mean(dim=(2, 3)), images.std(dim=(2, 3))), dim=1)
        return (features, features.repeat(1, 2)[:, :10]) if self.logits else features


def scored(tmp_path: Path, metrics: GenerativeMetrics, **options: Any) -> dict[str, float]:
    fit = trainer(callbacks=[metrics], limit_val_batches=1, default_root_dir=tmp_path, **options)
    found: dict[str, float] = fit.validate(module(), data(40), verbose=False)[0]
    return found


def test_scores_carry_what_they_depend_on(tmp_path: Path) -> None:
    metrics = GenerativeMetrics(
        ModuleEvaluator(module=Pool(logits=True), label="pool", judges_classes=True),
        num_samples=30,
        split="train",
        batch_norm=("running", "batch", "standing"),
        scores=("frechet", "kernel", "inception_score", "precision_recall", "agreement"),
    )
    with pytest.warns(UserWarning, match="classifier labels only"):
        found = scored(tmp_path, metrics)
    for mode in ("running", "batch", "standing"):
        for name in (
            "frechet_distance",
            "kernel_distance",
            "classifier_score",
            "precision",
            "recall",
            "agreement",
        ):
            assert f"{name}/pool/train/30/{mode}" in found
    assert not any(name.startswith(("fid", "kid")) for name in found)
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["batch_norm"] for line in lines] == ["running", "batch", "standing"]
    assert lines[0]["real_images"] == 40
    assert lines[0]["evaluator"] == "pool"
    assert lines[0]["scores"]["agreement"] == found["agreement/pool/train/30/running"]


def test_records_say_how_samples_were_drawn(tmp_path: Path) -> None:
    metrics = GenerativeMetrics(
        ModuleEvaluator(module=Pool(), label="pool"),
        num_samples=20,
        batch_norm=("standing",),
        scores=("frechet",),
    )
    gan = module()
    fit = trainer(callbacks=[metrics], limit_val_batches=1, default_root_dir=tmp_path)
    for sampling in (
        Sampling(guidance=0.3, batch_size=20),
        Sampling(truncation=2.0, guidance=0.5, standing_batches=3, batch_size=20),
    ):
        gan.sampling = sampling
        fit.validate(gan, data(40), verbose=False)
    assert set(metrics.last) == {"frechet_distance/pool/train/20/standing"}
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    drawn = [(line["truncation"], line["guidance"], line["standing_batches"]) for line in lines]
    assert drawn == [(None, 0.3, 16), (2.0, 0.5, 3)]
    assert [(line["batch_norm"], line["batch_size"]) for line in lines] == [("standing", 20)] * 2


def test_real_statistics_are_kept_by_content(tmp_path: Path) -> None:
    def run(**options: Any) -> tuple[dict[str, float], int]:
        pool = Pool()
        metrics = GenerativeMetrics(
            ModuleEvaluator(module=pool, label="pool"),
            num_samples=30,
            scores=("frechet",),
            cache=str(tmp_path / "cache"),
        )
        fit = trainer(callbacks=[metrics], limit_val_batches=1, default_root_dir=tmp_path)
        fit.validate(module(), data(40, **options), verbose=False)
        return metrics.last, pool.calls

    first, calls = run()
    second, fewer = run(batch_size=10)  # another order and other batches of the same images
    assert fewer == calls - 1
    assert first == second
    _, again = run(data_seed=5)
    assert again == calls
    assert len(list((tmp_path / "cache").glob("real_*.pt"))) == 2


def test_content_hash() -> None:
    images, labels = torch.rand(5, 1, 4, 4), torch.arange(5)
    order = torch.randperm(5)
    assert content_hash(images, labels) == content_hash(images[order], labels[order])
    assert content_hash(images, labels) != content_hash(images, labels.flip(0))
    assert to_bytes(torch.tensor([-1.0, 1.0])).tolist() == [0, 255]


def test_the_average_is_scored_during_fit(tmp_path: Path) -> None:
    class Watch(Pool):
        pass

    ema = GeneratorEMA(decay=0.9, start=0)
    metrics = GenerativeMetrics(
        ModuleEvaluator(module=Watch(), label="pool"), num_samples=20, scores=("frechet",)
    )
    gan = module()
    fit = trainer(
        max_steps=2, callbacks=[ema, metrics], limit_val_batches=1, val_check_interval=4, num_sanity_val_steps=1,
        default_root_dir=tmp_path,
    )  # fmt: skip
    fit.fit(gan, data(40))
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["game_updates"] for line in lines] == [1, 2]
    gan.generator.load_state_dict(ema.averaged().state_dict())
    alone = GenerativeMetrics(
        ModuleEvaluator(module=Watch(), label="pool"), num_samples=20, scores=("frechet",)
    )
    trainer(callbacks=[alone], limit_val_batches=1, default_root_dir=tmp_path).validate(
        gan, data(40), verbose=False
    )
    (value,) = alone.last.values()
    assert value == pytest.approx(lines[-1]["scores"]["frechet_distance"], rel=1e-5)


def test_scores_are_those_of_torchmetrics_on_the_images(tmp_path: Path) -> None:
    """Its classes with the extractor inside, fed with images; here all subsets and splits are whole."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    class Features(nn.Module):
        num_features = 6

        def forward(self, images: Tensor) -> Tensor:
            return Pool()(images)  # type: ignore[no-any-return]

    class Logits(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return Pool(logits=True)(images)[1]  # type: ignore[no-any-return]

    source, gan = data(60), module()
    metrics = GenerativeMetrics(
        ModuleEvaluator(module=Pool(logits=True), label="pool"),
        num_samples=60,
        scores=("frechet", "kernel", "inception_score"),
        options=ScoreOptions(kernel_subsets=2, kernel_subset_size=60, inception_splits=1),
    )
    trainer(callbacks=[metrics], limit_val_batches=1, default_root_dir=tmp_path).validate(
        gan, source, verbose=False
    )
    generator = torch.Generator().manual_seed(0)
    fakes = gan.sample_for_metrics(torch.arange(60) % 10, batch_norm="running", generator=generator)
    fid = FrechetInceptionDistance(feature=Features())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `.*` will save all extracted features")
        kid = KernelInceptionDistance(feature=Features(), subsets=2, subset_size=60)
        score = InceptionScore(feature=Logits(), splits=1)
    for metric in (fid, kid):
        metric.update(source.train_images, real=True)
        metric.update(fakes, real=False)
    score.update(fakes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "std")  # of one split
        inception = score.compute()[0]
    expected = {
        "frechet_distance": fid.compute(), "kernel_distance": kid.compute()[0], "classifier_score": inception
    }  # fmt: skip
    for name, value in expected.items():
        # Features are float32, and summed in other orders.
        assert metrics.last[f"{name}/pool/train/60/running"] == pytest.approx(value.item(), rel=1e-4), name


def test_every_real_image_counts_and_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training loader leaves out 2 of 42; and 25 samples are made ten at a time."""
    made: list[int] = []

    class Watched(BigGAN):
        def sample_for_metrics(self, labels: Tensor, **options: Any) -> Tensor:
            made.append(len(labels))
            return super().sample_for_metrics(labels, **options)

    monkeypatch.setattr(
        "lightning_nested.callbacks.generative_metrics.callback._NUMBERS_AT_ONCE", 10 * 3 * 32 * 32
    )
    metrics = GenerativeMetrics(
        ModuleEvaluator(module=Pool(logits=True), label="pool"), num_samples=25, scores=("frechet", "inception_score")
    )  # fmt: skip
    trainer(callbacks=[metrics], limit_val_batches=1, default_root_dir=tmp_path).validate(
        Watched(BigGANNetworks(width=2, latent_dim=8)), data(42, drop_last=True), verbose=False
    )
    (line,) = (json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines())
    assert line["real_images"] == 42
    assert made == [10, 10, 5]


class Numbered(BigGAN):
    """Its sample number i over all processes is the same, however many they are."""

    def sample_for_metrics(self, labels: Tensor, *, batch_norm: str, generator: torch.Generator) -> Tensor:
        total = labels.new_tensor(len(labels))
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        every = torch.arange(int(total))[self.trainer.global_rank :: self.trainer.world_size]
        return torch.stack([torch.randn(3, 32, 32, generator=seeded("cpu", int(i))) for i in every])


def test_two_processes_find_the_scores_of_one(tmp_path: Path) -> None:
    def scores(processes: int, **options: Any) -> dict[str, Any]:
        metrics = GenerativeMetrics(
            ModuleEvaluator(module=Pool(logits=True), label="pool", judges_classes=True),
            num_samples=31,
            scores=("frechet", "kernel", "inception_score", "precision_recall", "agreement"),
        )
        folder = tmp_path / str(processes)
        fit = trainer(
            callbacks=[metrics], limit_val_batches=1, default_root_dir=folder, devices=processes,
            max_steps=1, val_check_interval=4, num_sanity_val_steps=0, **options,
        )  # fmt: skip
        fit.fit(Numbered(BigGANNetworks(width=2, latent_dim=8)), data(64))
        (line,) = (json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines())
        assert (line["real_images"], line["samples"]) == (64, 31)
        return dict(line)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The classifier labels only")
        one, two = scores(1), scores(2, strategy="ddp_fork")
    assert one["scores"] == two["scores"]
    assert one["evaluator_accuracy"] == two["evaluator_accuracy"]


def test_fewer_samples_than_features(tmp_path: Path) -> None:
    metrics = GenerativeMetrics(ModuleEvaluator(module=Pool(), label="pool"), num_samples=6)
    with pytest.raises(MisconfigurationException, match=r"more images than features. Got 6 \(num_samples\)"):
        scored(tmp_path, metrics)
    metrics = GenerativeMetrics(
        ModuleEvaluator(module=nn.Flatten(), label="pixels"), num_samples=4000, split="train"
    )
    with pytest.raises(MisconfigurationException, match=r"Got 40 \(the real images of split='train'\)"):
        scored(tmp_path, metrics)


def test_fewer_samples_than_neighbours(tmp_path: Path) -> None:
    metrics = GenerativeMetrics(
        ModuleEvaluator(module=Pool(), label="pool"), num_samples=3, scores=("precision_recall",)
    )
    with pytest.raises(MisconfigurationException, match=r"3 nearest of more images. Got 3 \(num_samples\)"):
        scored(tmp_path, metrics)


def test_every_other_validation_also_of_a_resumed_run(tmp_path: Path) -> None:
    """Validations 1, 2 | 3, 4 with ``every_n_validations=3``: the third is scored."""

    def run(steps: int, **options: Any) -> int:
        pool = ModuleEvaluator(module=Pool(), label="pool")
        twice = [
            GenerativeMetrics(pool, num_samples=n, scores=("frechet",), every_n_validations=3)
            for n in (20, 30)
        ]
        fit = trainer(
            max_steps=steps, callbacks=[*twice, SampleGrid(), SampleGrid(seed=1)], limit_val_batches=1,
            val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=0, default_root_dir=tmp_path,
        )  # fmt: skip
        fit.fit(module(), data(32), **options)
        fit.save_checkpoint(tmp_path / "x.ckpt")
        return len(list(tmp_path.glob("scores.jsonl")))

    assert run(2) == 0
    assert run(4, ckpt_path=tmp_path / "x.ckpt", weights_only=True) == 1
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [(line["game_updates"], line["samples"]) for line in lines] == [(3, 20), (3, 30)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GenerativeMetrics(num_samples=1), "num_samples must be at least 2"),
        (lambda: GenerativeMetrics(split="all"), "split must be 'train', 'val' or 'test'"),  # type: ignore[arg-type]
        (
            lambda: GenerativeMetrics(scores=("fid",)),
            r"scores must be a list, each 'frechet', .* Got \('fid',\)",
        ),  # type: ignore[arg-type]
        (lambda: GenerativeMetrics(scores="frechet"), "scores must be a list, .* Got 'frechet'"),  # type: ignore[arg-type]
        (
            lambda: GenerativeMetrics(batch_norm=("train",)),
            "batch_norm must be a list, each 'running', 'batch' or 'standing'",
        ),  # type: ignore[arg-type]
        (lambda: ScoreOptions(kernel_subsets=0), "kernel_subsets must be at least 1. Got 0"),
        (lambda: SampleGrid(batch_norm="train"), "'running', 'batch' or 'standing'. Got 'train'"),
        (lambda: SampleGrid(0), "every_n_updates must be at least 1"),
    ],
)
def test_wrong_options(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_modules_and_data_that_do_not_fit(tmp_path: Path) -> None:
    from lightning_nested.modules import ImageClassifier

    for callback in (GenerativeMetrics(), SampleGrid()):
        with pytest.raises(MisconfigurationException, match="`sample_for_metrics`, as BigGAN has"):
            trainer(callbacks=[callback], max_steps=1).fit(ImageClassifier(input_shape=(3, 32, 32)), data(8))
    with pytest.raises(MisconfigurationException, match="takes the real images from a LightningDataModule"):
        trainer(callbacks=[GenerativeMetrics()], max_steps=1).fit(module(), [data(8)])


def test_modules_without_classes_or_images(tmp_path: Path) -> None:
    class NoClasses(BigGAN):
        num_classes: Any = None

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, None if name == "num_classes" else value)

    class Few(BigGAN):
        def sample_for_metrics(self, labels: Tensor, **_: Any) -> Tensor:
            return torch.zeros(len(labels) - 1, 3, 32, 32)

    class Pixels(BigGAN):
        def sample_for_metrics(self, labels: Tensor, **_: Any) -> Tensor:
            return torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)

    metrics = GenerativeMetrics(ModuleEvaluator(module=Pool(), label="pool"), num_samples=30)
    for kind, match in (
        (NoClasses, "`num_classes` must be at least 1. Got None of NoClasses"),
        (
            Few,
            r"Few.sample_for_metrics must return .* \(30, C, H, W\) .* Got torch.float32 \(29, 3, 32, 32\)",
        ),
        (Pixels, r"Got torch.uint8 \(30, 3, 32, 32\)"),
    ):
        run = trainer(callbacks=[metrics], limit_val_batches=1, default_root_dir=tmp_path)
        with pytest.raises(MisconfigurationException, match=match):
            run.validate(kind(BigGANNetworks(width=2, latent_dim=8)), data(40), verbose=False)
