from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_nested.callbacks import (
    ClassifierEvaluator,
    GenerativeMetrics,
    InceptionEvaluator,
    ModuleEvaluator,
)
from lightning_nested.callbacks.generative_metrics.evaluators import lent
from tests.modules.gan.tiny import data, module, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:You defined a `validation_step`", "ignore:.*sync_dist"
)


def test_a_classifier_trained_on_the_spot(tmp_path: Path) -> None:
    evaluator = ClassifierEvaluator(epochs=4, width=2, num_features=16, batch_size=20)
    metrics = GenerativeMetrics(evaluator, num_samples=40, scores=("frechet", "agreement"), split="train")
    source = data(400)
    fit = trainer(callbacks=[metrics], limit_val_batches=1, default_root_dir=tmp_path)
    fit.validate(module(), source, verbose=False)
    assert metrics.evaluator_accuracy >= 0.9
    assert not evaluator.is_inception
    assert len(list((tmp_path / "metrics_cache").glob("classifier_*.pt"))) == 1
    assert "frechet_distance/classifier/train/40/running" in metrics.last
    # The second run reads it.
    (path,) = (tmp_path / "metrics_cache").glob("classifier_*.pt")
    written = path.stat().st_mtime_ns
    again = GenerativeMetrics(evaluator, num_samples=40, scores=("frechet", "agreement"))
    trainer(callbacks=[again], limit_val_batches=1, default_root_dir=tmp_path).validate(
        module(), data(400), verbose=False
    )
    assert path.stat().st_mtime_ns == written
    assert again.last == metrics.last


def test_inception_without_network_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be a file. Got 'no.pth'. Download https://"):
        InceptionEvaluator(weights="no.pth").build(list, tmp_path)
    from torch_fidelity import feature_extractor_inceptionv3

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match=r"no route to host.*ClassifierEvaluator\(\)"):
        InceptionEvaluator().build(list, tmp_path)


@pytest.mark.slow
def test_inception_from_a_weights_file(tmp_path: Path) -> None:
    """Random weights: the shapes, the grey images and the names of the scores are what is tested."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: object, **__: object) -> None:
            return None

    torch.save({}, tmp_path / "empty.pth")
    network = Random(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth")
    )
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    extractor = InceptionEvaluator(weights=str(tmp_path / "weights.pth")).build(list, tmp_path)
    features, logits = extractor(torch.rand(2, 1, 32, 32) * 2 - 1)
    assert features.shape == (2, 2048)
    assert logits is not None
    assert logits.shape == (2, 1008)
    assert InceptionEvaluator().is_inception


# ---- modules that a user lends


class Features(nn.Module):
    """Six features with a batch norm, in which the mode matters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.BatchNorm2d(3), nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        x = self.scale * self.norm(images)
        return torch.cat((x.mean(dim=(2, 3)), x.std(dim=(2, 3))), dim=1)


def scored(features: nn.Module, folder: Path, *callbacks: Callback, **options: Any) -> GenerativeMetrics:
    metrics = GenerativeMetrics(
        ModuleEvaluator(module=features, label="f"), num_samples=30, scores=("frechet",)
    )
    run = trainer(callbacks=[*callbacks, metrics], limit_val_batches=1, default_root_dir=folder, **options)
    (run.fit(module(), data(40)) if options else run.validate(module(), data(40), verbose=False))
    return metrics


def test_a_lent_module_comes_back_as_it_was(tmp_path: Path) -> None:
    features = nn.Sequential(Features(), nn.Dropout(0.0).eval())
    features[0].norm.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in features.state_dict().items()}
    held = dict(features.named_buffers())
    scored(features, tmp_path)
    assert [m.training for m in features.modules()] == [True, True, True, False]
    assert [p.requires_grad for p in features.parameters()] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in features.state_dict().items())
    assert all(value is held[name] for name, value in features.named_buffers())


def test_a_lent_module_is_on_its_own_device_again_also_after_an_error() -> None:
    features = Features()
    values = [p.data_ptr() for p in features.parameters()]

    def fail() -> None:
        with lent(features, torch.device("meta")):
            assert {p.device.type for p in features.parameters()} == {"meta"}
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert [p.data_ptr() for p in features.parameters()] == values
    assert {b.device.type for b in features.buffers()} == {"cpu"}


@pytest.mark.filterwarnings("ignore:.*scores before and after do not compare")
def test_a_module_that_is_trained_meanwhile_is_scored_as_it_is_then(tmp_path: Path) -> None:
    """Real and generated images by the same weights, not real ones by those of the first scoring."""
    features = Features()

    class Train(Callback):
        def on_validation_end(self, *_: Any) -> None:
            with torch.no_grad():
                features.scale.mul_(10)

    options = {"max_steps": 2, "val_check_interval": 4, "num_sanity_val_steps": 0}
    moving = scored(features, tmp_path / "moving", Train(), **options)
    with torch.no_grad():
        features.scale.fill_(10)  # as at the second scoring
    still = scored(features, tmp_path / "still", **options)
    assert list(moving.last.values()) == list(still.last.values())
    # Features of the first scoring alone: those of other weights are of no use to a later run.
    assert len(list((tmp_path / "moving" / "metrics_cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda x: x.mean(), r"a row of features for each image. Got \(\) for 1"),
        (lambda x: {"features": x.flatten(1)}, "Got a dict of features"),
        (lambda x: (x.flatten(1),), r"Got a tuple of torch.float32 \(1, 3072\)"),
        (lambda x: x.mean(dim=0, keepdim=True).flatten(1).repeat(2, 1), r"Got \(2, 3072\) for 1 images"),
    ],
)
def test_modules_that_return_no_features(tmp_path: Path, forward: Any, match: str) -> None:
    class Wrong(nn.Module):
        def forward(self, images: Tensor) -> Any:
            return forward(images)

    with pytest.raises(ValueError, match=match):
        scored(Wrong(), tmp_path)
