"""Graphs of losses: their operations, and errors where one of them cannot be differentiated twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import Node


class DoubleBackwardError(RuntimeError):
    """An operation of the loss cannot be differentiated twice."""


@contextmanager
def explain_double_backward() -> Iterator[None]:
    """Turn autograd's error about a missing second derivative into one that names the ways out."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        marks = (
            "double backward",
            "Double backward",
            "is not implemented",
            "once_differentiable",
            "differentiate twice",
            "donated buffer",  # torch.compile; with those disabled it has no double backward either
        )
        if not any(mark in text for mark in marks):
            raise
        raise DoubleBackwardError(
            "A Hessian product needs the gradient to be differentiable, and an operation of the loss is not. "
            f"Got: {text.splitlines()[0]} Either run that operation in a form with a second derivative "
            "(torch.nn.attention.sdpa_kernel(SDPBackend.MATH) for attention, "
            "torch.backends.cudnn.flags(enabled=False) for RNNs, no torch.compile), "
            "or use curvature=FiniteDifference(), which needs first derivatives only."
        ) from error


def refuse_sparse(gradient: Sequence[Tensor | None]) -> None:
    """Raise if a gradient is a sparse tensor, which has no products with vectors of the parameters' shape."""
    for g in gradient:
        if g is not None and g.layout != torch.strided:
            raise ValueError(
                f"Gradients must be dense. Got one of shape {tuple(g.shape)} and layout {g.layout}; build the "
                "embedding with sparse=False."
            )


def graph_nodes(tensors: Iterable[Tensor | None]) -> Iterator[Node]:
    """Yield every operation in the graphs of ``tensors``, once."""
    seen: set[Node] = set()
    stack = [a.grad_fn for a in tensors if a is not None]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)


def refuse_once_differentiable(gradient: Sequence[Tensor | None]) -> None:
    """Raise if a gradient's graph holds an operation that autograd would pass over in silence when asked again."""
    if any(node.name().endswith("Error") for node in graph_nodes(gradient)):
        raise RuntimeError("an operation marked once_differentiable: differentiate twice is not implemented.")


def vjp(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    **options: bool,
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian product by ``torch.autograd.grad`` that tolerates tensors off the graph.

    Outputs without a graph and None cotangents contribute nothing; an input that is not reached gives None.
    """
    pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if y is not None and y.requires_grad]
    pairs = [(y, c) for y, c in pairs if c is not None]
    if not pairs or not inputs:
        return (None,) * len(inputs)
    ys, cs = zip(*pairs, strict=True)
    return torch.autograd.grad(ys, inputs, cs, allow_unused=True, **options)


class Pushforward:
    """Jacobian-vector products J u = d(Jᵀv)ᵀu/dv: the vjp, linear in a dummy v, differentiated in v.

    Not ``torch.func.jvp``: a function's own ``torch.autograd.grad`` does not compose with it, and
    ``grad(jvp(f))`` is silently wrong through LayerNorm and BatchNorm in torch 2.14.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._dummies = tuple(torch.zeros_like(y, requires_grad=True) for y in outputs)
        self.pulled = vjp(outputs, inputs, self._dummies, create_graph=True)

    def __call__(self, tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """J u for each output, with u given for each input; None stands for zeros."""
        return list(vjp(self.pulled, self._dummies, tangents, retain_graph=True))
