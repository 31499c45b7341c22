"""Layers whose weight is a matrix that multiplies rows: what a Kronecker-factored curvature needs to know of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.linalg.solvers.base import factorizable_dtype

Factors: TypeAlias = tuple[Tensor, Tensor]
"""Second moments of the inputs and of the gradients of the outputs."""


@dataclass(frozen=True, eq=False)
class Moment:
    """Sum of the outer products of rows. It is kept as rows where they are fewer numbers than their products."""

    matrix: Tensor
    is_sum: bool
    count: int

    @classmethod
    def of(cls, rows: Tensor) -> Moment:
        """Take rows of shape (count, size), which must not change later."""
        count, size = rows.shape
        return cls(rows.T @ rows, True, count) if count >= size else cls(rows, False, count)

    def add_to(self, total: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> None:
        """total ← beta · total + alpha · self, in place, in one pass over memory where rows are kept."""
        if self.is_sum:
            total.mul_(beta).add_(self.matrix, alpha=alpha)
        else:
            total.addmm_(self.matrix.T, self.matrix, beta=beta, alpha=alpha)

    def trace(self) -> Tensor:
        """Return the trace, which is finite if every entry is: none exceeds the diagonal."""
        return self.matrix.diagonal().sum() if self.is_sum else self.matrix.square().sum()


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose weight, seen as a matrix (outputs, inputs), has two Kronecker factors."""

    module: nn.Module
    weight: int  # position among the parameters
    bias: int | None

    def inputs(self, a: Tensor) -> Tensor:
        """Return new rows that the weight matrix multiplies, of shape (positions, inputs), with 1 for the bias."""
        m = self.module
        if isinstance(m, nn.Conv2d):
            padding = _same_padding(m) if isinstance(m.padding, str) else m.padding
            a = functional.unfold(a, m.kernel_size, m.dilation, padding, m.stride).transpose(1, 2)
        rows = a.reshape(-1, a.shape[-1])
        return rows.clone() if self.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)

    def gradients(self, g: Tensor) -> Tensor:
        """Return the gradients of the outputs, of shape (positions, outputs)."""
        if isinstance(self.module, nn.Conv2d):
            g = g.flatten(2).transpose(1, 2)
        return g.reshape(-1, g.shape[-1])

    @property
    def unbatched(self) -> int:
        """Dimensions of an input without a batch dimension."""
        return 3 if isinstance(self.module, nn.Conv2d) else 1

    @property
    def positions(self) -> list[int]:
        """Positions of its parameters among all."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def fits(self, factors: Sequence[Tensor]) -> bool:
        """Return True if factors have the shapes of this layer's."""
        return [f.shape for f in factors] == [f.shape for f in self.zeros()]

    @property
    def sides(self) -> tuple[int, int]:
        """Rows of its two factors: inputs, with one for the bias, and outputs."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight[0].numel() + (self.bias is not None), len(weight)

    def zeros(self) -> Factors:
        """Return factors of zeros."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        new = partial(torch.zeros, dtype=factorizable_dtype(weight.dtype), device=weight.device)
        inputs, outputs = self.sides
        return new(inputs, inputs), new(outputs, outputs)


def _same_padding(conv: nn.Conv2d) -> tuple[int, ...]:
    if conv.padding == "valid":
        return 0, 0
    return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))


def _is_symmetric(conv: nn.Conv2d) -> bool:
    """Return False where padding="same" adds more on one side."""
    return conv.padding != "same" or all(
        d * (k - 1) % 2 == 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
    )


def find_layers(module: nn.Module, parameters: Iterable[Tensor], max_size: int) -> list[Layer]:
    """Return the layers that have factors, with the positions of their parameters among ``parameters``."""
    position = {id(p): i for i, p in enumerate(parameters)}
    owners = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)

    def is_own(p: Tensor | None) -> bool:
        return p is None or (id(p) in position and owners[id(p)] == 1)

    layers = []
    for m in module.modules():
        # Exact classes: a subclass may compute something else.
        plain = type(m) is nn.Linear or (
            type(m) is nn.Conv2d and m.groups == 1 and m.padding_mode == "zeros" and _is_symmetric(m)
        )
        weight, bias = m._parameters.get("weight"), m._parameters.get("bias")
        if not plain or weight is None or not is_own(weight) or not is_own(bias):
            continue
        if max(len(weight), weight[0].numel()) <= max_size:
            layers.append(Layer(m, position[id(weight)], None if bias is None else position[id(bias)]))
    return layers


def stored_bytes(layers: Iterable[Layer], parameters: Sequence[Tensor]) -> tuple[int, int]:
    """Return the bytes of the layers' factors, and of one diagonal for all other parameters."""
    widths = [factorizable_dtype(p.dtype).itemsize for p in parameters]
    layers = tuple(layers)
    covered = {i for layer in layers for i in layer.positions}
    factors = sum(side**2 * widths[layer.weight] for layer in layers for side in layer.sides)
    return factors, sum(p.numel() * widths[i] for i, p in enumerate(parameters) if i not in covered)
