"""Checks of the batches that scores are computed from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_nested.callbacks.generative_metrics.images import gather_batches, images_and_labels

X, Y = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 300])


def test_further_entries_are_left_out() -> None:
    images, labels = images_and_labels([X, Y, torch.arange(4)])
    assert images is X
    assert labels is Y


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (X, r"need batches \(images, labels, …\).*Got torch.float32 \(4, 3, 8, 8\)"),
        ([X], r"Got a list of torch.float32 \(4, 3, 8, 8\); let its loaders return them"),
        ({"image": X, "label": Y}, "Got a dict of image, label"),
        ([X.to(torch.uint8), Y], r"Got torch.uint8 \(4, 3, 8, 8\); scale pixels"),
        ([Y, X], r"need images .* Got torch.int64 \(4,\)"),
        ([X, Y[:, None]], r"shape \(4,\). Got torch.int64 \(4, 1\); flatten"),
        ([X, Y[:3]], r"shape \(4,\). Got torch.int64 \(3,\)"),
        ([X, torch.eye(4)], r"Got torch.float32 \(4, 4\); .* argmax"),
        ([X, Y - 1], "must be at least 0. Got -1"),
    ],
)
def test_other_batches_are_refused(batch: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        images_and_labels(batch)


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must not be empty\. Got none"):
        gather_batches([])
