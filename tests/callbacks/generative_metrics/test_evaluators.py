from pathlib import Path

import pytest
import torch

from lightning_nested.callbacks import (
    ClassifierEvaluator,
    GenerativeMetrics,
    InceptionEvaluator,
)
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
