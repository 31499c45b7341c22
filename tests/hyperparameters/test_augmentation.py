"""Augmentations: the derivative of each strength, and what they keep of an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_nested.hyperparameters import (
    Brightness,
    Contrast,
    Cutout,
    HyperparameterVector,
    InputNoise,
    Saturation,
)
from tests.hyperparameters.built import built, images

STRENGTHS: dict[str, Callable[[], Any]] = {
    "brightness": Brightness, "contrast": Contrast, "saturation": Saturation, "noise": InputNoise,
}  # fmt: skip


@pytest.mark.parametrize("name", STRENGTHS)
def test_strengths_have_the_derivative_of_their_formula(name: str) -> None:
    """The change is linear in s: the derivative is (x′ − x)/s, at the same random numbers."""
    augment = built(STRENGTHS[name]())
    x = images()
    new = augment(x)
    assert new.shape == x.shape
    direction = torch.randn_like(x)
    (found,) = torch.autograd.grad((new * direction).sum(), augment.tensors["value"])
    share = (
        float(augment.value().detach()) / augment.transform.upper
    )  # s = upper·σ(raw): ds/d raw = s (1 − share)
    assert float(found) == pytest.approx(
        float(((new - x) * direction).sum().detach()) * (1 - share), rel=1e-9
    )
    assert float((new - x).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("name", STRENGTHS)
def test_each_image_has_its_own_strength(name: str) -> None:
    augment = built(STRENGTHS[name]())
    vector = HyperparameterVector([augment])
    h = torch.tensor([[-30.0], [0.0], [-30.0], [2.0]], dtype=torch.float64)
    x = images(4)
    with vector.bound(h) as values:
        new = augment(x)
        assert values[augment.name].shape == (4,)
    changed = (new - x).abs().amax(dim=(1, 2, 3)) > 1e-6
    assert changed.tolist() == [False, True, False, True]
    assert augment.tensors["value"].dim() == 0  # its own again


def test_what_the_augmentations_keep() -> None:
    x = images()
    contrast, saturation, noise = built(Contrast(0.5)), built(Saturation(0.5)), built(InputNoise(0.3))
    torch.testing.assert_close(contrast(x).mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(saturation(x).mean(dim=1), x.mean(dim=1))
    many = torch.zeros(200, 1, 16, 16, dtype=torch.float64)
    assert float(noise(many).detach().std()) == pytest.approx(0.3, rel=0.02)  # 51 200 numbers: ± 0.3 %
    ratio = built(Brightness(0.5))(x).detach() / x
    assert bool(((ratio > 0.5) & (ratio < 1.5)).all())
    torch.testing.assert_close(ratio.amax(dim=(1, 2, 3)), ratio.amin(dim=(1, 2, 3)))


def test_cutout_cuts_squares_of_its_length() -> None:
    cutout = built(Cutout(length=3, holes=1, max_length=6, max_holes=3))
    assert {k: float(v) for k, v in cutout.values().items()} == {"length": 3.0, "holes": 1.0}
    x = torch.ones(500, 1, 9, 9)
    holes = (cutout(x) == 0).squeeze(1)
    sizes = holes.sum(dim=(1, 2))
    assert int(sizes.max()) == 9
    assert int(sizes.min()) == 4  # centred on a corner
    vector = HyperparameterVector([cutout])
    two = vector.at_values({"cutout/length": 2, "cutout/holes": 2})
    none = vector.at_values({"cutout/holes": 0})
    with vector.bound(torch.stack([two, none] * 250)):
        sizes = (cutout(x) == 0).sum(dim=(1, 2, 3))
    assert int(sizes[::2].max()) == 8
    assert int(sizes[1::2].max()) == 0
