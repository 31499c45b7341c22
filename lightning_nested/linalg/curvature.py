"""Curvature of a loss as linear operators: Hessian, Gauss-Newton and finite-difference products.

Damping and weight decay are operators that one *adds*. Solvers need only products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_nested.linalg.differences import calibrated_length, central_difference, difference_length
from lightning_nested.linalg.graph import (
    Pushforward,
    explain_double_backward,
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
    The truncation error is O(ε²), rounding O(eps/ε); :meth:`calibrate` balances them.

    Attributes:
        length: Length of the move.
        calibrates: Whether the length is ours to measure.

    Args:
        gradient: Returns the gradients at the parameters' current values; noise and statistics frozen.
        params: Leaf parameters; they are moved through ``.data`` and restored, so graphs that hold them stay valid.
        epsilon: Length of the move relative to ``1 + ‖w‖``; None: half the cube root of the parameters' machine
            epsilon, not relative.
        length: First guess of the length, where ``epsilon`` is None.
    """

    def __init__(
        self,
        gradient: Callable[[], Vector],
        params: Vector,
        *,
        epsilon: float | None = None,
        length: float | None = None,
    ) -> None:
        self.gradient, self.like = gradient, params
        self.calibrates = epsilon is None
        self.length = length if length is not None else difference_length(params)
        if epsilon is not None:
            self.length = epsilon * (1.0 + float(norm(tuple(p.detach() for p in params))))

    def calibrate(self, v: Vector) -> float:
        """Set the length to nearly the best one along v, and return it."""
        assert self.like is not None
        self.length = calibrated_length(self.gradient, self.like, v, self.length)
        return self.length

    def matvec(self, v: Vector) -> Vector:
        """(g(w + εv) − g(w − εv)) / 2ε."""
        assert self.like is not None
        return central_difference(self.gradient, self.like, v, self.length)
