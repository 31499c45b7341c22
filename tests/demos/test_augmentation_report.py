"""AugmentationReport: what it needs, and that it draws without moving the random numbers of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested import AugmentationReport, ImageClassifier
from tests.trainers import trainer


class Noise(nn.Module):
    """Adds noise of size 0.1 to every pixel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + 0.1 * torch.randn_like(images)


def images() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 10), batch_size=20)


def fit(report: AugmentationReport | None, folder: Path, augmentation: nn.Module | None) -> None:
    torch.manual_seed(0)
    module = ImageClassifier("mlp", network_options={"hidden": [4]}, augmentation=augmentation)
    data = images()
    callbacks = [] if report is None else [report]
    trainer(*callbacks, folder=folder, limit_val_batches=0).fit(module, data, data)


def test_change_and_spread_are_those_of_the_augmentation(tmp_path: Path) -> None:
    report = AugmentationReport("a", images=3)
    fit(report, tmp_path, Noise())
    # Of a normal variable: 20 · 64 · 5 draws, and the standard deviation of five has mean 0.940 σ.
    assert report.results["change"] == pytest.approx(0.1 * (2 / torch.pi) ** 0.5, rel=0.05)
    assert report.results["spread"] == pytest.approx(0.094, rel=0.05)
    assert len(report.plot().axes) == 3 * 6
    assert (tmp_path / "a.png").stat().st_size > 5_000
    after = torch.rand(1)
    fit(None, tmp_path, Noise())
    assert torch.equal(after, torch.rand(1))


def test_half_precision_and_batches_that_are_mappings(tmp_path: Path) -> None:
    class ByName(ImageClassifier):
        def training_step(self, batch: Any, batch_idx: int = 0) -> torch.Tensor:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    named: Any = [{"y": labels, "x": pictures} for pictures, labels in images()]
    data: DataLoader[Any] = DataLoader(named, batch_size=None)
    report = AugmentationReport()
    module = ByName("mlp", network_options={"hidden": [4]}, augmentation=Noise())
    trainer(report, folder=tmp_path, precision="bf16-true", limit_val_batches=0).fit(module, data, data)
    assert report.results["change"] == pytest.approx(0.1 * (2 / torch.pi) ** 0.5, rel=0.05)


def test_batches_without_images_are_refused(tmp_path: Path) -> None:
    module = ImageClassifier("mlp", network_options={"hidden": [4]}, augmentation=Noise())
    data = DataLoader(TensorDataset(torch.rand(4, 64), torch.arange(4)), batch_size=4)
    with pytest.raises(
        MisconfigurationException, match=r"Got list with tensors of shapes \[\(4, 64\), \(4,\)\]"
    ):
        trainer(AugmentationReport(), folder=tmp_path, limit_val_batches=0).fit(module, data, data)


def test_a_module_without_augmentation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"Got ImageClassifier without one; give ImageClassifier"
    ):
        fit(AugmentationReport(), tmp_path, None)
