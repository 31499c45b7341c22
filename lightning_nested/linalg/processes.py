"""Average tensors over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_nested.linalg.vectors import Reduce, flatten, unflatten


class _Mean(torch.autograd.Function):
    """The mean over processes. So is its derivative: then means of local derivatives are the global ones."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reduce: Reduce) -> Tensor:
        ctx.reduce = reduce
        return reduce(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.reduce(gradients[0].contiguous().clone()), None


def average_gradients(
    gradients: Sequence[Tensor | None], like: Sequence[Tensor], reduce: Reduce | None
) -> tuple[Tensor | None, ...]:
    """The mean over processes in one message, differentiable; None where no process has a gradient."""
    if reduce is None:
        return tuple(gradients)
    used = torch.tensor([g is not None for g in gradients], dtype=like[0].dtype, device=like[0].device)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, like, strict=True)]
    flat: Tensor = _Mean.apply(flatten([*filled, used]), reduce)
    *mean, counts = unflatten(flat, [*filled, used])
    return tuple(
        g.to(p.dtype) if count else None
        for g, p, count in zip(mean, like, counts.detach().tolist(), strict=True)
    )
