"""Rotation, translation, scaling, shear and hue: pictures of known answer, and the derivative of each strength."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nested.hyperparameters import (
    Hue,
    HyperparameterVector,
    Rotation,
    Scaling,
    Shear,
    Translation,
)
from lightning_nested.hyperparameters.augmentation import Strength
from tests.hyperparameters.built import built, images

STRENGTHS: dict[str, Callable[[], Any]] = {
    "rotation": Rotation, "translation": Translation, "scaling": Scaling, "shear": Shear, "hue": Hue,
}  # fmt: skip


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every random number is the largest one, so that each image is changed by its whole strength."""
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.ones(size, **options))


def ramps(height: int, width: int) -> Tensor:
    """Return two images whose pixels are their own place in pixels from the centre: right of it, and below it."""
    down = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    right = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    return torch.stack([right.expand(height, width), down[:, None].expand(height, width)])[:, None]


def middle(images: Tensor) -> Tensor:
    """Return the pixels whose old place lies within the image, for small changes."""
    return images[..., 3:-3, 3:-3]


@pytest.mark.parametrize("name", STRENGTHS)
def test_strengths_have_the_derivative_of_their_formula(name: str) -> None:
    """Beside central differences at the same random numbers; pixels are smooth but on lines that no place lies on."""
    augment, x, step = built(STRENGTHS[name]()), images(), 1e-5
    raw = augment.tensors["value"]
    direction = torch.randn_like(x)

    def value() -> Tensor:
        torch.manual_seed(3)
        return (augment(x) * direction).sum()

    (found,) = torch.autograd.grad(value(), raw)
    with torch.no_grad():
        raw.add_(step)
        above = value()
        raw.sub_(2 * step)
        below = value()
        raw.add_(step)
    assert float(found) == pytest.approx(float(above - below) / (2 * step), rel=1e-6, abs=1e-8)
    assert abs(float(found)) > 1e-3


@pytest.mark.parametrize("name", STRENGTHS)
def test_each_image_has_its_own_strength(name: str) -> None:
    augment = built(STRENGTHS[name]())
    vector = HyperparameterVector([augment])
    h = torch.tensor([[-40.0], [0.0], [-40.0], [2.0]], dtype=torch.float64)
    x = images(4)
    with vector.bound(h):
        new = augment(x)
    assert new.shape == x.shape
    changed = (new - x).abs().amax(dim=(1, 2, 3)) > 1e-6
    assert changed.tolist() == [False, True, False, True]


@pytest.mark.usefixtures("largest")
def test_a_quarter_turn_is_the_image_turned() -> None:
    x = images(2)
    torch.testing.assert_close(built(Rotation(90.0))(x), x.rot90(1, dims=(2, 3)))


@pytest.mark.usefixtures("largest")
def test_an_oblong_image_turns_as_rigidly_as_a_square_one() -> None:
    """Each pixel of the ramps is its place, so that the new image holds the old places: R(−10°) of the new ones."""
    right, down = ramps(16, 24)
    angle = math.radians(10.0)
    turned = built(Rotation(10.0))(torch.stack([right, down]))
    expected = torch.stack(
        [math.cos(angle) * right - math.sin(angle) * down, math.sin(angle) * right + math.cos(angle) * down]
    )
    torch.testing.assert_close(middle(turned), middle(expected))


@pytest.mark.usefixtures("largest")
def test_a_shift_by_an_eighth_of_eight_pixels_is_by_one() -> None:
    x = images(2)
    assert x.shape[-1] == 8
    shifted = built(Translation(1 / 8))(x)
    torch.testing.assert_close(shifted[..., 1:, 1:], x[..., :-1, :-1])
    assert float(shifted[..., 0, :].detach().abs().max()) < 1e-12  # zeros come in


@pytest.mark.usefixtures("largest")
def test_scaling_and_shear_of_places() -> None:
    x = ramps(16, 24)
    torch.testing.assert_close(middle(built(Scaling(0.25))(x)), middle(x / 1.25))
    slanted = middle(built(Shear(5.0))(x))
    slope = math.tan(math.radians(5.0))
    torch.testing.assert_close(slanted[0], middle(x[0] + slope * x[1]))
    torch.testing.assert_close(slanted[1], middle(x[1]))


@pytest.mark.usefixtures("largest")
def test_a_third_of_the_colour_circle_exchanges_the_channels() -> None:
    x = images(2)
    turned = built(Hue(1 / 3))(x)
    torch.testing.assert_close(turned, x.roll(1, dims=1))
    torch.testing.assert_close(turned.mean(dim=1), x.mean(dim=1))


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: built(Hue())(torch.rand(2, 1, 8, 8)), "Hue needs colour images of 3 channels. Got 1"),
        (lambda: built(Rotation())(torch.rand(8, 8)), "Rotation needs images"),
        (lambda: Scaling(upper=1.0), "upper must be below 1"),
        (lambda: Shear(upper=90.0), "upper must be below 90 degrees"),
    ],
)
def test_bad_input_is_named(make: Callable[[], Strength], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        make()


def test_places_are_exact_under_autocast() -> None:
    """In bfloat16 those of an image of 224 pixels would be up to 0.19 pixels off."""
    right, rotation = ramps(8, 224)[:1].float(), built(Rotation(0.1))
    torch.manual_seed(0)
    expected = rotation(right)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = rotation(right)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
