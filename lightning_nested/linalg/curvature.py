"""Curvature of a loss as linear operators: Hessian, Gauss-Newton and finite-difference products.

Damping and weight decay are operators that one *adds*. Solvers need only products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_nested.linalg.differences import (
    OneSided,
    calibrate,
    central_difference,
    coarsest_epsilon,
    first_length,
)
from lightning_nested.linalg.graph import (
    Pushforward,
    explain_double_backward,
    refuse_sparse,
    refuse_wrong_derivatives,
    vjp,
)
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.separable import Separated, separate
from lightning_nested.linalg.shards import in_shards
from lightning_nested.linalg.vectors import Vector, norm, zeros_where_none


def owned(products: Sequence[Tensor | None], like: Vector, v: Vector) -> Vector:
    """Return products as tensors that may be overwritten: autograd may hand back v itself, or one tensor twice."""
    if in_shards(like):  # gradients that loss.backward() filled
        return zeros_where_none(products, like)
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
    products of a solve share the forward, its dropout masks and its batch statistics. Terms that act on every weight
    alone, decays say, are a diagonal, which the first product reads off the graph.
    Pearlmutter (1994), Neural Computation 6:147-160.

    Args:
        loss: Scalar with its graph. The graph is kept, so the caller can still call ``loss.backward()``.
        params: Leaves or intermediate tensors that ``loss`` depends on.
    """

    def __init__(self, loss: Tensor, params: Vector) -> None:
        self.like = params
        self.gradient = gradient_with_graph(loss, params)
        self._parts: Separated | None = None
        self._searched = False

    def matvec(self, v: Vector) -> Vector:
        """∂(gᵀv)/∂w, one backward pass through the gradient's graph."""
        assert self.like is not None
        with explain_double_backward():
            if not self._searched:
                self._parts, self._searched = separate(self.gradient, self.like), True
            if self._parts is not None:
                products = self._parts.product(self.like, v)
                return self._parts.add_diagonal_(owned(products, self.like, v), v)
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
            refuse_wrong_derivatives((loss, self._slope, *self._pushforward.pulled))

    def matvec(self, v: Vector) -> Vector:
        """Jᵀ (∂²L/∂o² (J v))."""
        assert self.like is not None
        with explain_double_backward():
            hjv = vjp((self._slope,), (self.outputs,), self._pushforward(v), retain_graph=True)
            products = vjp((self.outputs,), self.like, hjv, retain_graph=True)
        return owned(products, self.like, v)


class FiniteDifferenceOperator(LinearOperator):
    """Hessian product by differences of gradients: (g(w + εv) − g(w))/ε, or (g(w + εv) − g(w − εv))/2ε.

    No second derivative: for compiled models, flash attention, sharded models. A one-sided difference takes one
    gradient a product, since g(w) serves them all; its truncation error is O(ε), that of a central one O(ε²).
    Rounding is O(eps/ε); :meth:`calibrate` balances both.

    Attributes:
        length: Length of the move.
        sides: 1 or 2; see ``sides`` below.
        calibrates: Whether the length is ours to measure.
        error: About the relative error of products, from :meth:`calibrate`; NaN before.

    Args:
        gradient: Returns the gradients at the parameters' current values, in tensors that may be overwritten; noise
            and statistics frozen.
        params: Leaf parameters; they are moved through ``.data`` and restored, so graphs that hold them stay valid.
        epsilon: Length of the move relative to ``1 + ‖w‖``; None: ``length``.
        length: First guess of the length; None: see :func:`first_length`.
        here: g(w), which one-sided differences need; None: there are none.
        sides: 1 or 2; None: 2, and in :meth:`calibrate` 1 in float32 where that is right to 0.005.
        rounding: Machine epsilon of the coarsest dtype in the loss; None: that of the parameters.
    """

    def __init__(
        self,
        gradient: Callable[[], Vector],
        params: Vector,
        *,
        epsilon: float | None = None,
        length: float | None = None,
        here: Vector | None = None,
        sides: int | None = None,
        rounding: float | None = None,
    ) -> None:
        if sides == 1 and here is None:
            raise ValueError(
                "sides=1 needs here, the gradient at the parameters. Got None; give it, or sides=2."
            )
        self.gradient, self.like, self.here, self._wanted = gradient, params, here, sides
        self._one_sided = None if here is None else OneSided(gradient, params, here, rounded=epsilon is None)
        self._room: list[Tensor] = []
        self.calibrates, self.sides, self.error = epsilon is None, sides or 2, math.nan
        rounding = coarsest_epsilon(params) if rounding is None else rounding
        self._guesses = {sides: first_length(rounding, sides=sides) for sides in (1, 2)}
        # Half precision rounds too much for one-sided differences, and who computes in double wants its digits.
        self._may_be_one_sided = here is not None and _DOUBLE < rounding <= _ONE_SIDED**2
        if length is not None:
            self._guesses[self.sides] = length
        self.length = self._guesses[self.sides]
        if epsilon is not None:
            self.length = epsilon * (1.0 + float(norm(tuple(p.detach() for p in params))))
        self._known: tuple[Vector, Vector] | None = None

    def resume(self, length: float, sides: int) -> None:
        """Take the length of an earlier calibration."""
        sides = self._wanted or sides
        self.sides, self.length = (1, length) if sides == 1 and self._one_sided is not None else (2, length)
        self._guesses[self.sides] = length

    def calibrate(self, v: Vector) -> float:
        """Set the length to nearly the best one along v, and the sides, and return the length."""
        assert self.like is not None
        for sides in (1, 2) if self._wanted is None else (self._wanted,):
            if sides == 1 and not (self._may_be_one_sided or self._wanted == 1):
                continue
            one_sided = self._one_sided if sides == 1 else None
            found = calibrate(self.gradient, self.like, v, self._guesses[sides], one_sided)
            if sides == 2 or self._wanted == 1 or found.error <= _ONE_SIDED:
                break
        self.sides, self.length, self.error = sides, found.length, found.error
        self._known = None if found.product is None else (v, found.product)
        return self.length

    def matvec(self, v: Vector) -> Vector:
        """Hv; the first product after a calibration along v is made of its differences."""
        assert self.like is not None
        known, self._known = self._known, None
        if known is not None and all(map(torch.equal, v, known[0])):
            return known[1]
        if self.sides == 1 and self._one_sided is not None:
            return self._one_sided(v, self.length)
        return central_difference(self.gradient, self.like, v, self.length, self._room)


# Relative: the error up to which one gradient a product is preferred to two.
_ONE_SIDED = 5e-3
_DOUBLE = 1e-10  # machine epsilon
