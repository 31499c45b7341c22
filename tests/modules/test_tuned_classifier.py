"""TunedImageClassifier from fit to prediction."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.hyperparameters import InputNoise, LabelSmoothing
from lightning_nested.modules import TunedImageClassifier
from tests.trainers import trainer


def test_tuned_image_classifier_reads_its_hyperparameters() -> None:
    module = TunedImageClassifier(
        "cnn", [InputNoise(), LabelSmoothing()], input_shape=(1, 8, 8), network_options={"width": 2}
    )
    x = torch.rand(24, 1, 8, 8)
    batches = DataLoader(TensorDataset(x, torch.arange(24) % 10), batch_size=8)
    fit = trainer(max_epochs=2, limit_val_batches=1)
    fit.fit(module, batches, batches)
    assert module.per_example
    assert {"val_loss", "val_accuracy"} <= set(fit.callback_metrics)
    (result,) = fit.test(module, batches, verbose=False)
    assert set(result) == {"test_loss", "test_accuracy"}
    assert module.predict_step(x).sum(-1).sub(1).abs().max() < 1e-5
    with pytest.raises(ValueError, match="must be empty"):
        TunedImageClassifier(nn.Linear(2, 2), [LabelSmoothing()], network_options={"width": 2})
