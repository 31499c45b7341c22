"""How many terms a loss is the mean of: examples, or tokens, or pixels; read from its graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

_MEAN = 1  # as ATen numbers the kinds of reduction
_DEPTH = 30  # operations on scalars between a loss and its reduction


def loss_terms(loss: Tensor, divided: float = 1.0) -> float | None:
    """Return the number of terms that a scalar loss is the mean of; None if its graph does not say.

    Known are torch's losses with ``reduction="mean"`` (targets that are ignored do not count), ``mean()``, and sums: 1,
    or the number that one is divided by. Of several losses it is that of a loss of torch's, else of the first.

    Args:
        loss: Scalar with its graph, perhaps scaled.
        divided: Number by which its caller has divided it: accumulated batches.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 7, 5, requires_grad=True)  # two examples of five tokens
        >>> loss_terms(torch.nn.functional.cross_entropy(logits, torch.zeros(2, 5, dtype=torch.long)) / 3)
        10.0
    """
    found: list[tuple[bool, float]] = []
    stack: list[tuple[Any, float, int]] = [(loss.grad_fn, 1 / divided, 0)]
    while stack:
        node, divisor, depth = stack.pop()
        if node is None or depth > _DEPTH:
            continue
        try:
            terms = divisor if _is_sum(node) else _terms(node)
            if not _is_transparent(node):
                found += [] if terms is None else [(not hasattr(node, "_saved_reduction"), terms)]
                continue
            if node.name() == "DivBackward0" and node._saved_other is not None:
                divisor *= abs(float(node._saved_other))
        except RuntimeError:  # freed, changed in place, or no scalar
            continue
        # The first addend comes to the top.
        stack += [(after, divisor, depth + 1) for after, _ in reversed(node.next_functions)]
    return min(found, key=lambda each: each[0])[1] if found else None


def _is_transparent(node: Any) -> bool:
    """Return True for arithmetic on losses: a stack of them, and what is summed or averaged of it, included."""
    name = node.name()
    if name.startswith(("SumBackward", "MeanBackward")):
        after = node.next_functions[0][0]
        return (
            after is not None
            and after.name() == "StackBackward0"
            and tuple(node._saved_self_sym_sizes) == (len(after.next_functions),)
        )
    arithmetic = ("Div", "Mul", "Add", "Sub", "Neg", "ToCopy", "View", "Squeeze", "Stack")
    return bool(name.startswith(arithmetic))


def _is_sum(node: Any) -> bool:
    return node.name().startswith("SumBackward") or getattr(node, "_saved_reduction", _MEAN) != _MEAN


def _terms(node: Any) -> float | None:
    """Return the terms of a node that takes a mean over all of them."""
    if node.name().startswith("MeanBackward"):
        after = node.next_functions[0][0]
        # A mean over examples of means over their tokens.
        inner = after is not None and after.name().startswith("MeanBackward")
        return _terms(after) if inner else float(node._saved_self_sym_numel)
    target: Tensor | None = getattr(node, "_saved_target", None)
    if target is None or getattr(node, "_saved_reduction", None) != _MEAN:
        return None
    if hasattr(node, "_saved_ignore_index") and node._saved_weight is None:
        # The weight of classes would be no number of terms.
        return float(node._saved_total_weight)
    return float(target.numel())


def batch_size(batch: Any) -> int | None:
    """Return the first dimension of the first tensor in a batch that has one."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else None
    if is_dataclass(batch):
        parts: Any = [getattr(batch, field.name) for field in fields(batch)]
    elif isinstance(batch, Mapping):
        parts = batch.values()
    else:
        parts = batch if isinstance(batch, (list, tuple)) else ()
    return next((size for size in map(batch_size, parts) if size is not None), None)
