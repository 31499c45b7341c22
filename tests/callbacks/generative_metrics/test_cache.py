"""The metrics' cache: what its keys tell apart, and files that cannot be read or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nested.callbacks import ClassifierEvaluator, GenerativeMetrics, ModuleEvaluator
from lightning_nested.callbacks.generative_metrics.cache import write_cache
from lightning_nested.callbacks.generative_metrics.evaluators import _code_hash
from lightning_nested.callbacks.generative_metrics.images import content_hash
from tests.modules.gan.tiny import data, module, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:.*sync_dist", "ignore:The classifier labels only"
)


class Scaled(nn.Module):
    """Six features that depend on a plain attribute, and on a function that its source does not show."""

    def __init__(self, factor: float = 1.0, last: Any = torch.sin, limit: float = 2.0) -> None:
        super().__init__()
        self.factor, self.last, self.limit = factor, last, limit

    def forward(self, images: Tensor) -> Tensor:
        x = self.last(self.factor * torch.cat((images.mean(dim=(2, 3)), images.std(dim=(2, 3))), dim=1))
        return x.clamp(max=self.limit)


def distance(features: nn.Module, cache: Path, source: Any = None) -> float:
    metrics = GenerativeMetrics(
        ModuleEvaluator(module=features, label="f"), num_samples=30, scores=("frechet",), cache=str(cache)
    )
    run = trainer(callbacks=[metrics], limit_val_batches=1, default_root_dir=cache)
    run.validate(module(), source or data(40), verbose=False)
    (value,) = metrics.last.values()
    return value


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.Sequential(nn.AvgPool2d(16), nn.Flatten()), nn.Sequential(nn.MaxPool2d(16), nn.Flatten())),
        (nn.Sequential(nn.AvgPool2d(16), nn.Flatten()), nn.Sequential(nn.AvgPool2d(32), nn.Flatten())),
        (Scaled(), Scaled(3.0)),
        (Scaled(), Scaled(last=torch.cos)),
        # A limit that no image reaches: the features are the same, and so may the statistics be.
        (Scaled(limit=2.0), Scaled(limit=3.0)),
    ],
)
def test_another_function_with_the_same_weights(tmp_path: Path, first: nn.Module, second: nn.Module) -> None:
    distance(first, tmp_path / "shared")
    assert distance(second, tmp_path / "shared") == distance(second, tmp_path / "own")


def test_the_code_of_a_module_tells_apart_what_no_probe_shows() -> None:
    first = _code_hash(Scaled(limit=2.0))
    assert first == _code_hash(Scaled(limit=2.0).eval())
    assert first != _code_hash(Scaled(limit=3.0))

    class Other(Scaled):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)

    assert _code_hash(nn.Sequential(Other())) != _code_hash(nn.Sequential(Scaled()))


def test_pictures_that_are_the_same_only_in_eight_bits() -> None:
    labels, faint = torch.arange(3), 1e-3 * torch.rand(3, 1, 4, 4)
    hashes = {content_hash(x, labels) for x in (faint, 3 * faint, faint.double(), faint.bfloat16())}
    hashes |= {content_hash(faint, labels + shift) for shift in (1, 256)}
    hashes |= {content_hash(faint.view(3, 1, 2, 8), labels)}
    assert len(hashes) == 7


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def of_another_size(path: Path) -> None:
    found = torch.load(path, weights_only=True)
    torch.save({**found, "features": found["features"][:, :2]}, path)


@pytest.mark.parametrize("damage", [truncated, of_another_size, lambda path: path.write_bytes(b"")])
def test_damaged_statistics_are_made_again(tmp_path: Path, damage: Any) -> None:
    first = distance(Scaled(), tmp_path)
    (path,) = tmp_path.glob("real_*.pt")
    damage(path)
    with pytest.warns(UserWarning, match=f"must be readable. Got {path}.*made again"):
        assert distance(Scaled(), tmp_path) == first
    assert distance(Scaled(), tmp_path) == first


def test_a_damaged_classifier_is_trained_again(tmp_path: Path) -> None:
    evaluator, train = ClassifierEvaluator(epochs=1, width=2, num_features=4), data(40)
    train.setup("fit")
    images = torch.rand(2, 3, 32, 32)
    first = evaluator.build(train.train_dataloader, tmp_path)(images)
    (path,) = tmp_path.glob("classifier_*.pt")
    state = torch.load(path, weights_only=True)
    # The first tensors fit, so a network that was loaded in place would be half another one.
    torch.save({**{name: value + 1 for name, value in state.items()}, "head.bias": torch.zeros(3)}, path)
    with pytest.warns(UserWarning, match="size mismatch for head.bias"):
        again = evaluator.build(train.train_dataloader, tmp_path)(images)
    assert torch.equal(again[0], first[0])
    assert list(path.parent.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="must be a folder that can be written"):
        write_cache(tmp_path / "file" / "real_x.pt", {"count": 1})
