"""Strengths of augmentations that leave pixels in their place: brightness, contrast, saturation, noise, cutout."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_nested.arguments import checked
from lightning_nested.hyperparameters.scalar import Scalar, whole
from lightning_nested.hyperparameters.transforms import Interval
from lightning_nested.hyperparameters.weights import BoundHyperparameter


class Strength(Scalar):
    """An augmentation of images (batch, channels, height, width) with one strength s ≥ 0.

    The random part is drawn apart from s, so that the images have a derivative with respect to it.

    Args:
        init: Initial s.
        upper: Bound that s stays below.
        name: Attribute of the module that it becomes, and key in logs.
    """

    usage = (
        "self.brightness = None  # in __init__\n"
        "if self.brightness is not None:  # in the training loss\n"
        "    images = self.brightness(images)"
    )

    def __init__(self, init: float, upper: float, name: str) -> None:
        super().__init__(name, init, Interval(lower=0.0, upper=upper))

    def __call__(self, images: Tensor) -> Tensor:
        """Return augmented images of the same shape."""
        if images.dim() != 4:
            raise ValueError(
                f"{type(self).__name__} needs images (batch, channels, height, width). Got {tuple(images.shape)}."
            )
        return self._augment(images, self.value().to(images.dtype).reshape(-1, 1, 1, 1))

    @abstractmethod
    def _augment(self, images: Tensor, strength: Tensor) -> Tensor:
        """Augment with ``strength`` of shape (1 or batch, 1, 1, 1)."""


def _stretch(images: Tensor, strength: Tensor, around: Tensor | float) -> Tensor:
    """m + (x − m)·(1 + s·u), u uniform in [−1, 1) for each image."""
    u = 2 * torch.rand(len(images), 1, 1, 1, dtype=images.dtype, device=images.device) - 1
    return around + (images - around) * (1 + strength * u)


@checked
class Brightness(Strength):
    """x ← x·(1 + s·u), u uniform in [−1, 1] for each image."""

    def __init__(self, init: float = 0.1, upper: float = 1.0, name: str = "brightness") -> None:
        super().__init__(init, upper, name)

    def _augment(self, images: Tensor, strength: Tensor) -> Tensor:
        return _stretch(images, strength, 0.0)


@checked
class Contrast(Strength):
    """x ← m + (x − m)·(1 + s·u) with m the image's mean, u uniform in [−1, 1] for each image."""

    def __init__(self, init: float = 0.1, upper: float = 1.0, name: str = "contrast") -> None:
        super().__init__(init, upper, name)

    def _augment(self, images: Tensor, strength: Tensor) -> Tensor:
        return _stretch(images, strength, images.mean(dim=(1, 2, 3), keepdim=True))


@checked
class Saturation(Strength):
    """x ← g + (x − g)·(1 + s·u) with g the grey image (mean over channels), u uniform in [−1, 1] for each image."""

    def __init__(self, init: float = 0.1, upper: float = 1.0, name: str = "saturation") -> None:
        super().__init__(init, upper, name)

    def _augment(self, images: Tensor, strength: Tensor) -> Tensor:
        if images.shape[1] == 1:
            raise ValueError("Saturation needs colour images. Got one channel; leave it out.")
        return _stretch(images, strength, images.mean(dim=1, keepdim=True))


@checked
class InputNoise(Strength):
    """x ← x + s·ε, ε standard normal for each pixel."""

    def __init__(self, init: float = 0.05, upper: float = 1.0, name: str = "input_noise") -> None:
        super().__init__(init, upper, name)

    def _augment(self, images: Tensor, strength: Tensor) -> Tensor:
        return images + strength * torch.randn_like(images)


@checked
class Cutout(BoundHyperparameter):
    """Square holes set to zero: their side and their number are tuned, both whole numbers.

    No derivative: tuned by hypernetworks. DeVries & Taylor (2017), arXiv 1708.04552.

    Args:
        length: Initial side in pixels.
        holes: Initial number of holes.
        max_length: Largest side.
        max_holes: Largest number of holes.
        name: Attribute of the module that it becomes, and key in logs.
    """

    per_example = True
    usage = (
        "self.cutout = None  # in __init__\n"
        "if self.cutout is not None:  # in the training loss\n"
        "    images = self.cutout(images)"
    )

    def __init__(
        self, length: int = 4, holes: int = 1, max_length: int = 16, max_holes: int = 4, name: str = "cutout"
    ) -> None:
        super().__init__()
        if not (0 <= length <= max_length and 0 <= holes <= max_holes):
            raise ValueError(
                "0 ≤ length ≤ max_length and 0 ≤ holes ≤ max_holes must hold. "
                f"Got {length}, {max_length}, {holes}, {max_holes}."
            )
        self.name, self.init = name, {"length": length, "holes": holes}
        self.upper = {"length": max_length, "holes": max_holes}
        self._transforms = {key: Interval(lower=0, upper=upper + 1) for key, upper in self.upper.items()}
        # For its bounds on raw values, which all intervals share.
        self.transform = Interval(lower=0.0, upper=1.0)

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {key: torch.tensor(value, dtype=dtype) for key, value in self.init.items()}

    def _raw_start(self, key: str, value: Tensor) -> Tensor:
        return self.unconstrained(key, value)

    def natural(self, key: str, raw: Tensor) -> Tensor:
        """Return a whole number, as floating type."""
        return whole(self._transforms[key].forward(raw), self.upper[key])

    def unconstrained(self, key: str, value: Tensor) -> Tensor:
        """Return the middle of the interval that becomes ``value``."""
        return self._transforms[key].inverse(value + 0.5)

    def __call__(self, images: Tensor) -> Tensor:
        """Return images with holes; a hole may reach over the border."""
        length, holes = (self.natural(k, self.raw(k)).reshape(-1, 1, 1) for k in ("length", "holes"))
        n, _, height, width = images.shape
        rows = torch.arange(height, device=images.device).view(1, -1, 1)
        columns = torch.arange(width, device=images.device).view(1, 1, -1)
        keep = torch.ones(n, height, width, dtype=torch.bool, device=images.device)
        for hole in range(self.upper["holes"]):
            top = (torch.rand(n, 1, 1, device=images.device) * height).floor() - (length / 2).floor()
            left = (torch.rand(n, 1, 1, device=images.device) * width).floor() - (length / 2).floor()
            inside = (rows >= top) & (rows < top + length) & (columns >= left) & (columns < left + length)
            keep &= ~(inside & (hole < holes))
        return images * keep.unsqueeze(1).to(images.dtype)
