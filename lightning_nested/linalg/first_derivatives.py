"""Gradients of losses, also of those whose layers only ``loss.backward()`` reaches."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_nested.linalg.graph import HIDDEN, DoubleBackwardError, hides_layers, refuse_sparse
from lightning_nested.linalg.shards import is_shard


def first_derivative(
    loss: Tensor, inputs: Sequence[Tensor], others: Sequence[Tensor] = ()
) -> tuple[Tensor | None, ...]:
    """Return ∂loss/∂inputs, None where it does not depend on one; frees the graph.

    Behind reentrant checkpointing, and of shards, by ``loss.backward()``, and ``.grad`` of the inputs and of ``others``
    comes back as it was. Any further leaf of such a loss keeps a gradient in its ``.grad``.

    Args:
        loss: Scalar with its graph.
        inputs: Tensors to differentiate with respect to; leaves, where layers are hidden.
        others: Further leaves that the loss may depend on.

    Raises:
        DoubleBackwardError: Layers are hidden, and an input is no leaf.
        ValueError: A gradient is sparse.
    """
    known, found = getattr(loss, _KNOWN, ((), ()))
    if inputs and len(known) == len(inputs) and all(map(operator.is_, known, inputs)):
        return found
    leaves = (*inputs, *others)
    # torch.autograd.grad does not see parameters that are gathered from shards.
    if any(map(is_shard, leaves)) or hides_layers(loss):
        if not all(x.is_leaf for x in leaves):
            raise DoubleBackwardError(HIDDEN)
        with _without_gradients(leaves):
            loss.backward()  # type: ignore[no-untyped-call]
            found = tuple(x.grad for x in inputs)
    else:
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
    refuse_sparse(found)
    return found


def knowing(loss: Tensor, inputs: Sequence[Tensor], derivatives: Sequence[Tensor | None]) -> Tensor:
    """Return a loss of which :func:`first_derivative` by these inputs needs no backward pass, for it is known."""
    setattr(loss, _KNOWN, (tuple(inputs), tuple(derivatives)))
    return loss


_KNOWN = "_lightning_nested_derivatives"


@contextmanager
def _without_gradients(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Put ``.grad`` aside until exit, and the hooks that run once it is filled."""
    kept = [x.grad for x in leaves]
    hooks: list[Any] = [getattr(x, "_post_accumulate_grad_hooks", None) or {} for x in leaves]
    copies = [dict(live) for live in hooks]
    try:
        for x, live in zip(leaves, hooks, strict=True):
            x.grad = None
            live.clear()
        yield
    finally:
        for x, grad, live, copied in zip(leaves, kept, hooks, copies, strict=True):
            x.grad = grad
            live.update(copied)
