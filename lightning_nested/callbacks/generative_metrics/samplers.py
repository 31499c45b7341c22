"""What a module must offer so that its samples can be scored and drawn."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_nested.callbacks.generative_metrics.images import described


class Sampler(Protocol):
    """LightningModule whose samples :class:`GenerativeMetrics` and :class:`SampleGrid` can score and draw.

    Attributes:
        num_classes: Classes that samples can be asked for. A module whose attribute ``is_conditional`` is False, as an
            unconditional :class:`GANModule` has, needs none.
    """

    num_classes: int | None

    def sample_for_metrics(self, labels: Tensor, *, batch_norm: str, generator: torch.Generator) -> Tensor:
        """Return a sample for each label, ``(N, C, H, W)`` in [−1, 1]; without classes labels are N zeros."""
        ...


def require_sampler(callback: Callback, module: LightningModule) -> None:
    """Raise MisconfigurationException unless the module is a :class:`Sampler`."""
    if not hasattr(module, "sample_for_metrics"):
        raise MisconfigurationException(
            f"{type(callback).__name__} needs a module with `num_classes` and `sample_for_metrics`, as BigGAN has. "
            f"Got {type(module).__name__}; every GANModule has both."
        )
    classes = getattr(module, "num_classes", None)
    if has_classes(module) and (not isinstance(classes, int) or classes < 1):
        raise MisconfigurationException(
            f"{type(callback).__name__} asks for samples of each class, so `num_classes` must be at least 1. Got "
            f"{classes!r} of {type(module).__name__}; set num_classes=1 on it where there is one kind of images, or "
            "is_conditional=False."
        )


def has_classes(module: object) -> bool:
    """Return True if samples of the module are of a class that can be asked for."""
    return bool(getattr(module, "is_conditional", True))


def labels_for(module: LightningModule, count: int) -> Tensor:
    """Return labels of ``count`` samples, equally many of each class; zeros where there are none."""
    return torch.arange(count) % (cast(Sampler, module).num_classes or 1 if has_classes(module) else 1)


def sampling_settings(module: object) -> dict[str, float | None]:
    """Return the numbers of the module's ``sampling`` that its samples depend on, as :class:`BigGAN` has them."""
    sampling = getattr(module, "sampling", None)
    names = ("truncation", "guidance", "standing_batches", "batch_size")
    found = {name: getattr(sampling, name) for name in names if hasattr(sampling, name)}
    # Only what JSON can hold: the object may be anybody's.
    return {name: value for name, value in found.items() if value is None or isinstance(value, int | float)}


def check_samples(module: LightningModule, images: Any, count: int) -> Tensor:
    """Return what ``sample_for_metrics`` made as float32; raise MisconfigurationException if it is no samples."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.shape[:1] != (count,):
        raise MisconfigurationException(
            f"{type(module).__name__}.sample_for_metrics must return an image for each label, floating point of shape "
            f"({count}, C, H, W) in [−1, 1]. Got {described(images)}."
        )
    return images.float()
