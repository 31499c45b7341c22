"""Refuse data, labels and logits that are no GAN's, each error with its cure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def check_batch(batch: Any) -> Sequence[Any]:
    """Return a batch as a sequence that begins with floating-point data."""
    parts = (batch,) if isinstance(batch, Tensor) else batch
    if not isinstance(parts, Sequence) or not len(parts) or not isinstance(parts[0], Tensor):
        got = (
            f"{type(batch).__name__} with {list(batch)}"
            if isinstance(batch, Mapping)
            else type(batch).__name__
        )
        raise ValueError(
            f"A GAN's batch must be a tensor of data, or a sequence (data, labels, …). Got a {got}; let the dataset "
            "return tuples, or override real_data."
        )
    if not parts[0].is_floating_point() and not parts[0].is_complex():
        raise ValueError(
            f"A GAN's data must be floating point, as the generator's output is. Got {parts[0].dtype}; scale it to "
            "the generator's range, for tanh by images.float() / 127.5 - 1."
        )
    return parts


def check_fakes(real: Tensor, fake: Tensor, labels: Tensor | None, fake_labels: Tensor | None) -> None:
    """Refuse fakes and labels of other shapes than the data's: one forward takes both."""
    if fake.shape[1:] != real.shape[1:]:
        raise ValueError(
            "The generator must make examples of the data's shape. "
            f"Got {tuple(fake.shape[1:])} and data {tuple(real.shape[1:])}; reshape one of them."
        )
    if labels is None or fake_labels is None:
        return
    kinds = [(tuple(x.shape[1:]), x.is_floating_point()) for x in (labels, fake_labels)]
    if kinds[0] != kinds[1] or len(labels) != len(real):
        got, wanted = (f"{x.dtype} {tuple(x.shape)}" for x in (labels, fake_labels))
        raise ValueError(
            f"The data's labels must have one row per example and be of the kind of sample_labels. Got {got} for "
            f"{len(real)} examples, and {wanted} of sample_labels; flatten class numbers of shape (n, 1), take "
            "argmax(dim=1) of one-hot labels, give class numbers as integers, or override sample_labels."
        )


def check_logits(logits: Any, count: int) -> Tensor:
    """Return logits ``(n,)`` from ``(n,)`` or ``(n, 1)``, and ``(n, p)`` from maps ``(n, 1, …)`` of p patches.

    Example:
        >>> import torch
        >>> [tuple(check_logits(torch.zeros(3, *s), 3).shape) for s in ((), (1,), (1, 2, 2))]
        [(3,), (3,), (3, 4)]
    """
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.shape[:1] != (count,) or logits.shape[1:2] not in ((), (1,)):
        raise ValueError(
            "The discriminator must return one logit per example, (n,) or (n, 1), or a map of them (n, 1, …) for "
            f"patches. Got {shape} for {count} examples; end it in one output channel, or override discriminate."
        )
    return logits.flatten() if logits.numel() == count else logits.flatten(1)
