"""Strengths of augmentations that move pixels or turn colours: rotation, translation, scaling, shear, hue.

Learned from validation images, a strength says which changes of an image leave its label as it is: Benton, Finzi,
Izmailov & Wilson (2020), "Learning Invariances in Neural Networks".
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from lightning_nested.arguments import checked
from lightning_nested.hyperparameters.augmentation import Strength


class AffineStrength(Strength):
    """An affine map of the pixel grid about the image's centre, with bilinear interpolation and zeros outside.

    A subclass gives the map from a place in the new image to the place in the old one that it shows.
    """

    def _augment(self, images: Tensor, strength: Tensor) -> Tensor:
        n, _, height, width = images.shape
        matrix = self._matrix(strength.reshape(-1), n, width / height)
        # Places in half precision would be pixels off.
        exact = images if images.dtype.itemsize > 2 else images.float()
        with torch.autocast(images.device.type, enabled=False):
            grid = affine_grid(matrix.to(exact.dtype), list(images.shape), align_corners=False)
            found = grid_sample(exact, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return found.to(images.dtype)

    @abstractmethod
    def _matrix(self, strength: Tensor, n: int, aspect: float) -> Tensor:
        """Return the maps, shape (n, 2, 3), between coordinates that go from −1 to 1 over the image.

        Args:
            strength: Of shape (1,) or (n,).
            n: Number of images.
            aspect: Width over height.
        """


def _signed(n: int, strength: Tensor) -> Tensor:
    """Return uniform numbers in [−1, 1), one for each image."""
    return 2 * torch.rand(n, dtype=strength.dtype, device=strength.device) - 1


def _rows(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """Return matrices [[a, b, c], [d, e, f]], shape (n, 2, 3)."""
    return torch.stack([a, b, c, d, e, f], dim=1).reshape(-1, 2, 3)


@checked
class Rotation(AffineStrength):
    """Turn each image about its centre by s·u degrees, u uniform in [−1, 1) for each image.

    With s = 180 every angle is as likely as any other. As ``RandomRotation(s)`` of torchvision, bilinear.
    """

    def __init__(self, init: float = 10.0, upper: float = 180.0, name: str = "rotation") -> None:
        super().__init__(init, upper, name)

    def _matrix(self, strength: Tensor, n: int, aspect: float) -> Tensor:
        angle = torch.deg2rad(strength * _signed(n, strength))
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        return _rows(cos, -sin / aspect, zero, sin * aspect, cos, zero)


@checked
class Translation(AffineStrength):
    """Shift each image by s·u of its width and s·v of its height, u and v uniform in [−1, 1) for each image."""

    def __init__(self, init: float = 0.05, upper: float = 0.5, name: str = "translation") -> None:
        super().__init__(init, upper, name)

    def _matrix(self, strength: Tensor, n: int, aspect: float) -> Tensor:
        # The coordinates go from −1 to 1: a width is 2.
        right, down = 2 * strength * _signed(n, strength), 2 * strength * _signed(n, strength)
        one, zero = torch.ones_like(right), torch.zeros_like(right)
        return _rows(one, zero, -right, zero, one, -down)


@checked
class Scaling(AffineStrength):
    """Enlarge each image about its centre by the factor 1 + s·u, u uniform in [−1, 1) for each image."""

    def __init__(self, init: float = 0.1, upper: float = 0.9, name: str = "scaling") -> None:
        super().__init__(init, upper, name)
        if not upper < 1:
            raise ValueError(f"upper must be below 1, so that no image shrinks to nothing. Got {upper}.")

    def _matrix(self, strength: Tensor, n: int, aspect: float) -> Tensor:
        shrunk = 1 / (1 + strength * _signed(n, strength))
        zero = torch.zeros_like(shrunk)
        return _rows(shrunk, zero, zero, zero, shrunk, zero)


@checked
class Shear(AffineStrength):
    """Slant each image: a row at height y above the centre moves by y·tan(s·u), s in degrees, u uniform in [−1, 1)."""

    def __init__(self, init: float = 5.0, upper: float = 60.0, name: str = "shear") -> None:
        super().__init__(init, upper, name)
        if not upper < 90:
            raise ValueError(f"upper must be below 90 degrees, where the tangent is infinite. Got {upper}.")

    def _matrix(self, strength: Tensor, n: int, aspect: float) -> Tensor:
        slope = torch.deg2rad(strength * _signed(n, strength)).tan()
        one, zero = torch.ones_like(slope), torch.zeros_like(slope)
        return _rows(one, slope / aspect, zero, zero, one, zero)


@checked
class Hue(Strength):
    """Turn the colours of each RGB image by s·u of the colour circle, u uniform in [−1, 1) for each image.

    The turn is a rotation about the grey axis r = g = b, which keeps grey and the mean over channels, and is smooth
    where the hue of HSV is not. s = 0.5 reaches every hue. Colours may leave [0, 1].
    """

    def __init__(self, init: float = 0.05, upper: float = 0.5, name: str = "hue") -> None:
        super().__init__(init, upper, name)

    def _augment(self, images: Tensor, strength: Tensor) -> Tensor:
        if images.shape[1] != 3:
            raise ValueError(f"Hue needs colour images of 3 channels. Got {images.shape[1]}; leave it out.")
        turns = strength.reshape(-1)
        angle = (2 * math.pi * turns * _signed(len(images), turns)).view(-1, 1, 1, 1)
        grey = images.mean(dim=1, keepdim=True)
        # Rodrigues' formula about k = (1, 1, 1)/√3; k × x has the differences of the other two channels.
        across = (images.roll(1, dims=1) - images.roll(-1, dims=1)) / math.sqrt(3)
        return grey + (images - grey) * angle.cos() + across * angle.sin()
