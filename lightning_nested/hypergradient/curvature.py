"""Curvature as linear operators: anything with ``A @ v`` on tuples of tensors.

Hessian, Gauss-Newton and finite-difference products, diagonals, and sums and scalings of them, so that damping
and weight decay are operators that one *adds*. Solvers need only products.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, overload, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_nested.hypergradient.vectors import (
    Reduce,
    Vector,
    add_,
    average,
    flatten,
    norm,
    scale_,
    unflatten,
)


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
        """The product A v, in tensors that the caller may overwrite."""

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
        product = self.first.matvec(v)
        if isinstance(self.second, DiagonalOperator):
            return self.second.add_product_(product, v)  # saves a temporary of the size of the model
        return add_(product, self.second.matvec(v))


class ScaledOperator(LinearOperator):
    """c·A."""

    def __init__(self, operator: LinearOperator, factor: float) -> None:
        self.operator, self.factor = operator, float(factor)
        self.symmetric, self.like = operator.symmetric, operator.like

    def matvec(self, v: Vector) -> Vector:
        """C (A v)."""
        return scale_(self.operator.matvec(v), self.factor)


class UnitProducts(LinearOperator):
    """A v = ‖v‖ · A(v/‖v‖): products in half precision stay in range whatever the length of v."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        self.symmetric, self.like = operator.symmetric, operator.like

    def matvec(self, v: Vector) -> Vector:
        """The product with the unit vector, and its length again."""
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
        return tuple(
            a * (d.to(a.dtype) if isinstance(d, Tensor) else d)
            for a, d in zip(v, self._entries(v), strict=True)
        )

    def add_product_(self, out: Vector, v: Vector) -> Vector:
        """Out ← out + d ∘ v in place; returns out."""
        for o, a, d in zip(out, v, self._entries(v), strict=True):
            if isinstance(d, Tensor):
                o.addcmul_(a, d.to(a.dtype).expand_as(a))
            elif d:
                o.add_(a, alpha=d)
        return out


class FlatOperatorAdapter(LinearOperator):
    """Any object with ``A @ v`` on a flat vector, seen as an operator on tuples.

    Raises:
        ValueError: In a product: it has another size, dtype or device than the vector.
    """

    def __init__(self, operator: FlatOperator, like: Vector, *, symmetric: bool = True) -> None:
        self.operator, self.like, self.symmetric = operator, like, symmetric

    def matvec(self, v: Vector) -> Vector:
        """A v through one flat vector."""
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
    """``operator`` as a :class:`LinearOperator` on tuples shaped as ``like``.

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


def _materialize(products: Sequence[Tensor | None], like: Vector) -> Vector:
    return tuple(torch.zeros_like(p) if a is None else a for a, p in zip(products, like, strict=True))


def _own(products: Sequence[Tensor | None], like: Vector, v: Vector) -> Vector:
    """Products as tensors that may be overwritten: autograd may hand back v itself, or one tensor twice."""
    taken = {a.untyped_storage().data_ptr() for a in v}
    owned = []
    for product in _materialize(products, like):
        storage = product.untyped_storage().data_ptr()
        owned.append(
            product if storage not in taken and product.is_contiguous() else product.clone().contiguous()
        )
        taken.add(storage)
    return tuple(owned)


def refuse_sparse(gradient: Sequence[Tensor | None]) -> None:
    """Raise if a gradient is a sparse tensor, which has no products with vectors of the parameters' shape."""
    for g in gradient:
        if g is not None and g.layout != torch.strided:
            raise ValueError(
                f"Gradients must be dense. Got one of shape {tuple(g.shape)} and layout {g.layout}; build the "
                "embedding with sparse=False."
            )


def graph_nodes(tensors: Iterable[Tensor | None]) -> Iterator[Node]:
    """Every operation in the graphs of ``tensors``, once."""
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


def difference_length(loss: Tensor, params: Vector) -> float:
    """Relative length of the move for central differences: half the cube root of a loss's machine epsilon.

    That of the coarsest dtype among its operations: under ``torch.autocast`` rounding is the narrow dtype's,
    whatever the parameters are kept in. The half is measured: networks of bfloat16 and float16 have their least
    error at 0.08–0.15 and 0.05–0.08; in float32 the two lengths serve alike.
    """
    dtypes = {p.dtype for p in params}
    for node in graph_nodes([loss]):
        dtypes.update(meta.dtype for meta in node._input_metadata)
    return _difference_length(dtypes)


def _difference_length(dtypes: Iterable[torch.dtype]) -> float:
    coarsest: float = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    return float(coarsest ** (1 / 3)) / 2


def gradient_with_graph(loss: Tensor, params: Vector) -> Vector:
    """∂L/∂w with a graph of its own, zeros where the loss does not depend on a parameter.

    Autograd is silent about an operation that can be differentiated only once: it leaves an error node behind that a
    derivative with respect to the parameters never reaches, and the operation's curvature would be missing. So the
    incoming gradient of one requires gradients, which makes every such operation leave its node, and the graph is
    searched for one.

    Raises:
        DoubleBackwardError: An operation of the loss can be differentiated only once.
    """
    one = torch.ones_like(loss, requires_grad=True)
    with explain_double_backward():
        gradient = torch.autograd.grad(loss, params, one, create_graph=True, allow_unused=True)
        refuse_sparse(gradient)
        refuse_once_differentiable(gradient)
    return _materialize(gradient, params)


class HessianOperator(LinearOperator):
    """Hessian ∂²L/∂w² by the kept graph of the gradient: Hv = ∂(gᵀv)/∂w.

    The gradient is built once with its graph; a product is then one backward pass through that graph, so all
    products of a solve share the forward, its dropout masks and its batch statistics.
    Pearlmutter (1994), Neural Computation 6:147-160.

    Args:
        loss: Scalar with its graph. The graph is kept, so the caller can still call ``loss.backward()``.
        params: Leaves or intermediate tensors that ``loss`` depends on.
    """

    def __init__(self, loss: Tensor, params: Vector) -> None:
        self.like = params
        self.gradient = gradient_with_graph(loss, params)
        self._live = [i for i, g in enumerate(self.gradient) if g.requires_grad]

    def matvec(self, v: Vector) -> Vector:
        """One backward pass through the gradient's graph."""
        assert self.like is not None
        if not self._live:  # the loss is linear in the parameters
            return _materialize([None] * len(v), self.like)
        outputs = [self.gradient[i] for i in self._live]
        with explain_double_backward():
            products = torch.autograd.grad(
                outputs, self.like, [v[i] for i in self._live], retain_graph=True, allow_unused=True
            )
        return _own(products, self.like, v)


class GaussNewtonOperator(LinearOperator):
    """Generalised Gauss-Newton Jᵀ ∂²L/∂o² J, with o the network's outputs: positive semi-definite for convex L(o).

    Needs fewer matrix products than the Hessian and never has negative curvature.
    Schraudolph (2002), Neural Computation 14:1723-1738.

    Args:
        loss: Scalar with its graph, a function of ``outputs``.
        outputs: The intermediate tensor that the loss is convex in (logits), any shape.
        params: Parameter tensors.
    """

    def __init__(self, loss: Tensor, outputs: Tensor, params: Vector) -> None:
        self.like, self.outputs = params, outputs
        with explain_double_backward():
            (self._slope,) = torch.autograd.grad(loss, outputs, create_graph=True)
            # The gradient is linear in a dummy cotangent u, so its derivative along v with respect to u is J v.
            self._dummy = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(outputs, params, self._dummy, create_graph=True, allow_unused=True)
        self._live = [i for i, g in enumerate(pulled) if g is not None]
        self._pulled = [g for g in pulled if g is not None]

    def matvec(self, v: Vector) -> Vector:
        """J v, then the loss's own Hessian, then Jᵀ."""
        assert self.like is not None
        with explain_double_backward():
            (jv,) = torch.autograd.grad(
                self._pulled, self._dummy, [v[i] for i in self._live], retain_graph=True
            )
            if not self._slope.requires_grad:  # linear in the outputs
                return _materialize([None] * len(v), self.like)
            (hjv,) = torch.autograd.grad(self._slope, self.outputs, jv, retain_graph=True)
            products = torch.autograd.grad(self.outputs, self.like, hjv, retain_graph=True, allow_unused=True)
        return _own(products, self.like, v)


class FiniteDifferenceOperator(LinearOperator):
    """Hessian product by central differences of gradients: Hv ≈ (g(w + εv) − g(w − εv)) / 2ε.

    Two gradients a product and no second derivative: for compiled models, flash attention, sharded models.
    The truncation error is O(ε²), rounding O(eps/ε).

    Args:
        gradient: Returns the gradients at the parameters' present values; noise and statistics frozen.
        params: Leaf parameters; they are moved through ``.data`` and put back, so graphs that hold them stay valid.
        epsilon: Length of the move relative to ``1 + ‖w‖``; None: half the cube root of the parameters' machine
            epsilon. Give one where gradients are computed in a narrower dtype, see :func:`difference_length`.
    """

    def __init__(
        self, gradient: Callable[[], Vector], params: Vector, *, epsilon: float | None = None
    ) -> None:
        self.gradient, self.like = gradient, params
        relative = epsilon if epsilon is not None else _difference_length([p.dtype for p in params])
        self._length = relative * (1.0 + float(norm(tuple(p.detach() for p in params))))

    def matvec(self, v: Vector) -> Vector:
        """Two gradients at w ± εv."""
        assert self.like is not None
        return central_difference(self.gradient, self.like, v, self._length)


def central_difference(function: Callable[[], Vector], params: Vector, v: Vector, length: float) -> Vector:
    """Derivative of ``function`` along v at the parameters' present values, moving them by ``length``."""
    size = float(norm(v))
    if size == 0.0:
        return tuple(torch.zeros_like(a) for a in function())
    epsilon = length / size
    home = [p.data for p in params]
    try:
        for p, here, direction in zip(params, home, v, strict=True):
            p.data = here.add(direction, alpha=epsilon)
        ahead = function()
        for p, here, direction in zip(params, home, v, strict=True):
            p.data = here.add(direction, alpha=-epsilon)
        behind = function()
    finally:
        for p, here in zip(params, home, strict=True):
            p.data = here
    return tuple((a - b) / (2 * epsilon) for a, b in zip(ahead, behind, strict=True))
