"""Checks of arguments that several entry points share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_tensors(name: str, tensors: Sequence[Tensor], hint: str = "") -> None:
    """Raise ValueError unless ``tensors`` is a sequence of at least one floating-point tensor."""
    if isinstance(tensors, Tensor) or len(tensors) == 0:
        raise ValueError(f"{name} must be a sequence of at least one tensor. Got {type(tensors).__name__}.")
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}[{i}] must be a floating-point tensor. Got {got}.{hint}")


def as_scalar(name: str, value: object) -> Tensor:
    """Return a loss as a 0-dimensional tensor, or raise ValueError if it has more than one element."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a tensor with one element. Got {got}; take its mean or sum.")
    return value.reshape(())
