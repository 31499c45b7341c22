"""Curvature of a loss as linear operators: Hessian, Gauss-Newton and finite-difference products.

Damping and weight decay are operators that one *adds*. Solvers need only products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_nested.linalg.graph import (
    Pushforward,
    explain_double_backward,
    graph_nodes,
    refuse_sparse,
    refuse_wrong_derivatives,
    vjp,
)
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.vectors import Vector, norm, zeros_where_none


def owned(products: Sequence[Tensor | None], like: Vector, v: Vector) -> Vector:
    """Return products as tensors that may be overwritten: autograd may hand back v itself, or one tensor twice."""
    taken = {a.untyped_storage().data_ptr() for a in v}
    result = []
    for product in zeros_where_none(products, like):
        storage = product.untyped_storage().data_ptr()
        fresh = storage not in taken and product.is_contiguous()
        result.append(product if fresh else product.clone().contiguous())
        taken.add(storage)
    return tuple(result)


def difference_length(params: Vector, loss: Tensor | None = None) -> float:
    """Relative length of the move for central differences: half the cube root of the machine epsilon.

    The epsilon is that of the coarsest dtype among the parameters and the operations of the loss: under
    ``torch.autocast`` rounding is the narrow dtype's, whatever the parameters are kept in. The half is measured:
    networks of bfloat16 and float16 have their least error at 0.08–0.15 and 0.05–0.08; in float32 the two lengths
    serve alike.
    """
    dtypes = {p.dtype for p in params}
    for node in graph_nodes([loss]):
        dtypes.update(meta.dtype for meta in node._input_metadata)
    coarsest: float = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    return float(coarsest ** (1 / 3)) / 2


def gradient_with_graph(loss: Tensor, params: Vector) -> Vector:
    """∂L/∂w with a graph of its own, zeros where the loss does not depend on a parameter.

    Autograd is silent about an operation that can be differentiated only once: it leaves an error node behind that a
    derivative with respect to the parameters never reaches, and the operation's curvature would be missing. So the
    incoming gradient of one requires gradients, which makes every such operation leave its node, and the graph is
    searched for one.

    Raises:
        DoubleBackwardError: An operation of the loss can be differentiated only once, or a second time wrongly.
        RuntimeError: Reentrant checkpointing hides layers.
    """
    one = torch.ones_like(loss, requires_grad=True)
    with explain_double_backward():
        gradient = torch.autograd.grad(loss, params, one, create_graph=True, allow_unused=True)
        refuse_sparse(gradient)
        refuse_wrong_derivatives((loss, *gradient))
    return zeros_where_none(gradient, params)


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

    def matvec(self, v: Vector) -> Vector:
        """∂(gᵀv)/∂w, one backward pass through the gradient's graph."""
        assert self.like is not None
        with explain_double_backward():
            products = vjp(self.gradient, self.like, v, retain_graph=True)
        return owned(products, self.like, v)


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
            self._pushforward = Pushforward((outputs,), params)

    def matvec(self, v: Vector) -> Vector:
        """Jᵀ (∂²L/∂o² (J v))."""
        assert self.like is not None
        with explain_double_backward():
            hjv = vjp((self._slope,), (self.outputs,), self._pushforward(v), retain_graph=True)
            products = vjp((self.outputs,), self.like, hjv, retain_graph=True)
        return owned(products, self.like, v)


class FiniteDifferenceOperator(LinearOperator):
    """Hessian product by central differences of gradients: Hv ≈ (g(w + εv) − g(w − εv)) / 2ε.

    Two gradients a product and no second derivative: for compiled models, flash attention, sharded models.
    The truncation error is O(ε²), rounding O(eps/ε).

    Args:
        gradient: Returns the gradients at the parameters' current values; noise and statistics frozen.
        params: Leaf parameters; they are moved through ``.data`` and restored, so graphs that hold them stay valid.
        epsilon: Length of the move relative to ``1 + ‖w‖``; None: half the cube root of the parameters' machine
            epsilon. Give one where gradients are computed in a narrower dtype, see :func:`difference_length`.
    """

    def __init__(
        self, gradient: Callable[[], Vector], params: Vector, *, epsilon: float | None = None
    ) -> None:
        self.gradient, self.like = gradient, params
        relative = epsilon if epsilon is not None else difference_length(params)
        self.length = relative * (1.0 + float(norm(tuple(p.detach() for p in params))))

    def matvec(self, v: Vector) -> Vector:
        """(g(w + εv) − g(w − εv)) / 2ε."""
        assert self.like is not None
        return central_difference(self.gradient, self.like, v, self.length)


def central_difference(function: Callable[[], Vector], params: Vector, v: Vector, length: float) -> Vector:
    """Derivative of ``function`` along v at the parameters' current values, moving them by ``length``."""
    size = float(norm(v))
    if size == 0.0:
        return tuple(torch.zeros_like(a) for a in function())
    epsilon, home, values = length / size, [p.data for p in params], []
    try:
        for move in (epsilon, -epsilon):
            for p, here, direction in zip(params, home, v, strict=True):
                p.data = here.add(direction, alpha=move)
            values.append(function())
    finally:
        for p, here in zip(params, home, strict=True):
            p.data = here
    return tuple((a - b) / (2 * epsilon) for a, b in zip(*values, strict=True))
