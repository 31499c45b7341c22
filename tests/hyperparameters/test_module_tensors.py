"""Tensors of a module, found by their dotted name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nested.hyperparameters import (
    ModuleTensors,
)


class Augmented(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.augmenter = nn.Linear(2, 2)
        self.network = nn.Linear(2, 1)
        self.images = torch.zeros(3, 2)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)


@pytest.mark.parametrize(
    ("path", "names"),
    [("augmenter", ["weight", "bias"]), ("augmenter.weight", ["weight"]), ("images", ["images"])],
)
def test_tensors_are_found_by_their_dotted_name(path: str, names: list[str]) -> None:
    tensors = ModuleTensors(path)
    tensors.attach(Augmented())
    assert list(tensors.tensors) == names
    assert all(t.requires_grad and t.is_leaf for t in tensors.tensors.values())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("augmentor", "'augmentor'; close names: augmenter"),
        ("frozen", "require gradients"),
        ("forward", "leaf tensor"),
    ],
)
def test_names_that_hold_nothing_are_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModuleTensors(path).attach(Augmented())
