"""Drawn images: their range, their classes, and their seed."""

import pytest
import torch

from lightning_nested.datamodules import SyntheticImagesDataModule


def test_synthetic_classes_are_told_apart_by_their_mean() -> None:
    data = SyntheticImagesDataModule(train_size=200, val_size=50)
    data.setup()
    assert data.train_images.shape == (200, 3, 32, 32)
    assert -1 <= data.train_images.min() < -0.5 < 0.5 < data.train_images.max() <= 1
    means = torch.stack([data.train_images[data.train_labels == k].mean(dim=0) for k in range(10)])
    distance = torch.cdist(data.test_images.flatten(1), means.flatten(1))
    assert (distance.argmin(dim=1) == data.test_labels).float().mean() > 0.95
    again = SyntheticImagesDataModule(train_size=200, val_size=50)
    again.setup()
    assert torch.equal(again.train_images, data.train_images)
    with pytest.raises(ValueError, match="channels must be 1 or 3"):
        SyntheticImagesDataModule(channels=2)
