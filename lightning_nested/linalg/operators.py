"""Linear operators on tuples of tensors: anything with a product ``A @ v``, sums, multiples and diagonals of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, overload, runtime_checkable

from torch import Tensor

from lightning_nested.linalg.processes import Reduce, average
from lightning_nested.linalg.shards import parts
from lightning_nested.linalg.vectors import Vector, add_, flatten, norm, scale_, unflatten


@runtime_checkable
class FlatOperator(Protocol):
    """Any object with ``A @ v`` on a flat vector of shape (n,): a matrix, a curvlinops operator, a K-FAC inverse."""

    def __matmul__(self, v: Tensor, /) -> Tensor: ...


class LinearOperator(ABC):
    """A square linear operator on tuples of tensors.

    ``A @ v`` takes a tuple with the shapes of the parameters, or one flat tensor of shape (n,), and returns the
    same form. The result is freshly allocated: the caller may overwrite it.
    """

    symmetric: bool = True
    like: Vector | None = None  # a tuple with the shapes of the space; None: any shapes

    @abstractmethod
    def matvec(self, v: Vector) -> Vector:
        """Return the product A v, in tensors that the caller may overwrite."""

    def add_product_(self, out: Vector, v: Vector) -> Vector:
        """out ← out + A v in place; returns out."""
        return add_(out, self.matvec(v))

    @overload
    def __matmul__(self, v: Vector) -> Vector: ...
    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    def __matmul__(self, v: Vector | Tensor) -> Vector | Tensor:
        if not isinstance(v, Tensor):
            return self.matvec(tuple(v))
        if self.like is None:
            return self.matvec((v,))[0]
        return flatten(self.matvec(unflatten(v, self.like)))

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return SumOperator(self, other)

    def __mul__(self, factor: float) -> LinearOperator:
        return ScaledOperator(self, factor)

    __rmul__ = __mul__


class SumOperator(LinearOperator):
    """A + B."""

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        self.first, self.second = first, second
        self.symmetric = first.symmetric and second.symmetric
        self.like = first.like if first.like is not None else second.like

    def matvec(self, v: Vector) -> Vector:
        """A v + B v."""
        return self.second.add_product_(self.first.matvec(v), v)


class ScaledOperator(LinearOperator):
    """c·A."""

    def __init__(self, operator: LinearOperator, factor: float) -> None:
        self.operator, self.factor = operator, float(factor)
        self.symmetric, self.like = operator.symmetric, operator.like

    def matvec(self, v: Vector) -> Vector:
        """c·(A v)."""
        return scale_(self.operator.matvec(v), self.factor)


class UnitProducts(LinearOperator):
    """A with products taken at unit length: in half precision they stay in range whatever the length of v."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        self.symmetric, self.like = operator.symmetric, operator.like

    def matvec(self, v: Vector) -> Vector:
        """‖v‖ · A(v/‖v‖)."""
        size = float(norm(v))
        if size == 0.0 or not math.isfinite(size):
            return self.operator.matvec(v)
        return scale_(self.operator.matvec(tuple(a / size for a in v)), size)


class DiagonalOperator(LinearOperator):
    """diag(d): weight decay, damping, a diagonal preconditioner.

    Args:
        diagonal: A number (damping: d·I), or one entry per parameter tensor, each a number or a tensor of any
            floating dtype that broadcasts to the parameter's shape. Products have the dtype of the vector.
    """

    def __init__(self, diagonal: float | Sequence[Tensor | float]) -> None:
        self.diagonal = diagonal

    def _entries(self, v: Vector) -> Sequence[Tensor | float]:
        return [self.diagonal] * len(v) if isinstance(self.diagonal, (int, float)) else self.diagonal

    def matvec(self, v: Vector) -> Vector:
        """D ∘ v."""
        pairs = zip(v, self._entries(v), strict=True)
        return tuple(a * (d.to(a.dtype) if isinstance(d, Tensor) else d) for a, d in pairs)

    def add_product_(self, out: Vector, v: Vector) -> Vector:
        """out ← out + d ∘ v in place, without a temporary of the size of the model; returns out."""
        for o, a, d in zip(parts(out), parts(v), self._entries(v), strict=True):
            if isinstance(d, Tensor):
                (own,) = parts((d,))
                o.addcmul_(a, own.to(a.dtype).expand_as(a))
            elif d:
                o.add_(a, alpha=d)
        return out


class FlatOperatorAdapter(LinearOperator):
    """Operator on tuples by any object with ``A @ v`` on a flat vector.

    Raises:
        ValueError: In a product: it has another size, dtype or device than the vector.
    """

    def __init__(self, operator: FlatOperator, like: Vector) -> None:
        self.operator, self.like = operator, like

    def matvec(self, v: Vector) -> Vector:
        """A v by one flat vector."""
        flat = flatten(v)
        name, n = type(self.operator).__name__, flat.numel()
        shape = getattr(self.operator, "shape", None)
        if isinstance(shape, tuple) and tuple(shape) != (n, n):
            raise ValueError(
                f"An operator must act on flat vectors of all parameters, of shape ({n},). Got {name} of shape "
                f"{tuple(shape)}; give one for the parameters that the inner optimizer trains, in their order."
            )
        if isinstance(self.operator, Tensor):
            _same_kind(self.operator, flat, "An operator")
        product = self.operator @ flat
        if not isinstance(product, Tensor) or product.shape != flat.shape:
            got = f"shape {tuple(product.shape)}" if isinstance(product, Tensor) else type(product).__name__
            raise ValueError(f"A product with {name} must have the vector's shape ({n},). Got {got}.")
        _same_kind(product, flat, f"A product with {name}")
        return unflatten(product.clone(), v)


def _same_kind(tensor: Tensor, flat: Tensor, what: str) -> None:
    if (tensor.dtype, tensor.device) != (flat.dtype, flat.device):
        raise ValueError(
            f"{what} must have the dtype and device of the parameters, {flat.dtype} on {flat.device}. "
            f"Got {tensor.dtype} on {tensor.device}; convert it with .to(...)."
        )


def as_operator(operator: LinearOperator | FlatOperator, like: Vector) -> LinearOperator:
    """Return ``operator`` as a :class:`LinearOperator` on tuples shaped as ``like``.

    Raises:
        TypeError: ``operator`` has no ``@``.
    """
    if isinstance(operator, LinearOperator):
        return operator
    if not isinstance(operator, FlatOperator):
        raise TypeError(
            f"An operator needs `A @ v` on a flat vector. Got {type(operator).__name__}; "
            "give a matrix, a LinearOperator, or any object with __matmul__."
        )
    return FlatOperatorAdapter(operator, like)


class AveragedOperator(LinearOperator):
    """The mean of each process's operator: every product is averaged, so a solver sees the global batch.

    Exact because differentiation is linear in the per-process loss.
    """

    def __init__(self, operator: LinearOperator, reduce: Reduce) -> None:
        self.operator, self.reduce = operator, reduce
        self.symmetric, self.like = operator.symmetric, operator.like

    def matvec(self, v: Vector) -> Vector:
        """(1/P) Σₚ Aₚ v, in one message."""
        return average(self.operator.matvec(v), self.reduce)
