"""Images that scores are computed from: checks, their content, and 8-bit pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def only_images(batch: Any) -> Tensor:
    """Return the data of a batch that is a tensor, or a sequence that begins with one.

    Raises:
        ValueError: If it is anything else, or not floating point.
    """
    data = batch[0] if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) else batch
    if not isinstance(data, Tensor) or not data.is_floating_point() or data.ndim < 2:
        raise ValueError(
            f"Scores need images (N, C, H, W) in [−1, 1], or other data (N, …). Got {described(batch)}; scale pixels "
            "of 8 bits by images.float() / 127.5 - 1, and let a GANModule's real_data take the data out of a dict."
        )
    return data


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the images and the labels of a batch ``(images, labels, …)``.

    Raises:
        ValueError: If it is anything else, the images are not floating point, or the labels no class numbers ``(N,)``.
    """
    if isinstance(batch, Tensor | str) or not isinstance(batch, Sequence) or len(batch) < 2:
        raise ValueError(
            f"Scores need batches (images, labels, …) of the datamodule. Got {described(batch)}; let its "
            "loaders return them, with labels of zeros if the images have none."
        )
    images, labels = batch[:2]
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2:
        raise ValueError(
            f"Scores need images (N, C, H, W) in [−1, 1]. Got {described(images)}; scale pixels of 8 bits by "
            "images.float() / 127.5 - 1."
        )
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != images.shape[:1]:
        raise ValueError(
            f"Scores need a class number for each image, whole numbers of shape ({len(images)},). "
            f"Got {described(labels)}; flatten labels of shape (N, 1), and take argmax(dim=1) of one-hot ones."
        )
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(
            f"Class numbers must be at least 0. Got {int(labels.min())}; number the classes 0, 1, 2, …, or leave "
            "images without a class out of the datamodule's loaders."
        )
    return images, labels


def described(value: Any) -> str:
    """Return what a value is, for errors.

    Example:
        >>> described((torch.zeros(2, 1), {"y": 1}))
        'a tuple of torch.float32 (2, 1), a dict of y'
    """
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, value))}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {', '.join(map(described, value)) or 'nothing'}"
    return f"a {type(value).__name__}"


def gather_batches(batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Join the images and the labels of batches ``(images, labels, …)``."""
    images, labels = zip(*_some(map(images_and_labels, batches)), strict=True)
    return torch.cat(images), torch.cat(labels)


def gather_images(batches: Iterable[Any]) -> Tensor:
    """Join the data of batches, which may have labels or anything else beside it."""
    return torch.cat(_some(map(only_images, batches)))


def _some(parts: Iterable[T]) -> list[T]:
    found = list(parts)
    if not found:
        raise ValueError("The split of real images must not be empty. Got none; choose another split.")
    return found


def content_hash(images: Tensor, labels: Tensor | None = None) -> str:
    """Return a name for a set of images and their labels that does not depend on their order; exact to the last bit.

    Example:
        >>> images, labels = torch.rand(3, 1, 2, 2), torch.arange(3)
        >>> content_hash(images, labels) == content_hash(images.flip(0), labels.flip(0))
        True
    """
    marks = [b""] * len(images) if labels is None else [int(y).to_bytes(8, "little") for y in labels.tolist()]
    digests = sorted(
        hashlib.blake2b(raw_bytes(image) + mark, digest_size=16).digest()
        for image, mark in zip(images, marks, strict=True)
    )
    kind = f"{images.dtype} {tuple(images.shape[1:])}".encode()
    return hashlib.sha256(kind + b"".join(digests)).hexdigest()


def raw_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's values, in any dtype."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def to_bytes(images: Tensor) -> Tensor:
    """Convert [−1, 1] to 0 … 255, rounded.

    Example:
        >>> to_bytes(torch.tensor([-1.0, 0.0, 1.0])).tolist()
        [0, 128, 255]
    """
    return torch.clamp((images + 1.0) * 127.5 + 0.5, 0, 255).to(torch.uint8)
