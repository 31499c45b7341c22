"""Check of products with the curvature at one point, cheap enough for the middle of a training run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nested.hypergradient.inner_curvature import Linearization
from lightning_nested.linalg.curvature import (
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    HessianOperator,
)
from lightning_nested.linalg.differences import (
    calibrated_length,
    central_difference,
    coarsest_epsilon,
    difference_length,
    moved,
)
from lightning_nested.linalg.graph import graph_nodes
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.vectors import Vector, double_dot, norm

# Relative. A difference of gradients adds up kinks that it passes, which a second derivative at one point does not see.
_SMOOTH, _KINKED = 0.05, 0.3
_KINKS = re.compile(
    r"Relu|Hardtanh|Hardsw|Hardsig|Threshold|MaxPool|Clamp|Abs|Maximum|Minimum|L1Loss|Huber|Where|Sort|TopK"
)


@dataclass(frozen=True, kw_only=True)
class ProductCheck:
    """Result of :func:`check_products`; NaN where nothing could be compared."""

    asymmetry: float = math.nan  # |uᵀAv − vᵀAu|, relative to the norm of A
    difference: float = math.nan  # ‖Av − (g(w + εv) − g(w))/ε‖, relative to the longer of both
    tolerance: float = _SMOOTH  # difference up to which products are right, more where the loss has kinks
    noise: float = 0.0  # asymmetry that rounding of the coarsest dtype may give

    @property
    def asymmetric(self) -> bool:
        """True if the products are not those of a symmetric matrix."""
        return self.asymmetry > self.noise

    @property
    def wrong(self) -> bool:
        """True if the products are not the gradient's derivative."""
        return self.difference > self.tolerance


def check_products(
    problem: Linearization,
    params: Vector,
    v: Vector,
    *,
    loss: Tensor | None = None,
    repeat: Callable[[], Tensor] | None = None,
) -> ProductCheck:
    """Compare products with a curvature among themselves, and with a difference of gradients.

    One product and one gradient where the loss can be evaluated again, two products where it cannot; more only where
    they disagree, to tell a wrong product from a move that was too long. Random numbers are from a generator of its
    own, and the parameters come back bit for bit.

    Args:
        problem: The inner loss around its parameters.
        params: The parameters w.
        v: Direction of one product, the outer gradient: there products matter.
        loss: The inner loss, whose graph tells in which dtypes it was computed.
        repeat: Evaluates the inner loss again at the parameters' current values, with the same random numbers and
            without side effects; None: there is no difference of gradients.

    Example:
        A gradient of which a factor was detached is not a derivative's.

        >>> from lightning_nested.hypergradient import Hessian
        >>> w = (torch.tensor([1.0, 2.0], requires_grad=True),)
        >>> loss = lambda: (w[0] ** 2 * w[0].detach()).sum()
        >>> v = (torch.ones(2),)
        >>> check_products(Hessian().linearize(loss(), w), w, v, loss=loss(), repeat=loss).wrong
        True
    """
    operator, size = problem.curvature, float(norm(v))
    known = isinstance(operator, HessianOperator | GaussNewtonOperator | FiniteDifferenceOperator)
    if not known or size == 0.0 or not math.isfinite(size):
        return ProductCheck()
    v = tuple(a / size for a in v)
    product = operator.matvec(v)
    if not math.isfinite(float(norm(product))):  # the solver says so
        return ProductCheck()
    tolerance = _KINKED if any(_KINKS.search(node.name()) for node in graph_nodes([loss])) else _SMOOTH
    difference = _difference(problem, params, v, product, loss, repeat, tolerance)
    return ProductCheck(
        # Products that are those of differences are symmetric.
        asymmetry=math.nan if difference <= tolerance else _asymmetry(operator, v, product),
        difference=difference,
        tolerance=tolerance,
        noise=_noise(operator, params, loss),
    )


def _asymmetry(operator: LinearOperator, v: Vector, product: Vector) -> float:
    """Return |uᵀAv − vᵀAu| of a random u, relative to the norm of A."""
    generator = torch.Generator().manual_seed(0)
    u = tuple(torch.randn(a.shape, generator=generator).to(a) for a in v)
    size = float(norm(u))
    u = tuple(a / size for a in u)
    other = operator.matvec(u)
    # A random unit vector sees a product of length ‖Av‖ as ‖Av‖/√n.
    root = math.sqrt(sum(a.numel() for a in v))
    scale = float(norm(product)) + root * float(norm(other))
    found = abs(float(double_dot(u, product) - double_dot(v, other))) * root
    return found / scale if scale > 0 else math.nan


def _noise(operator: LinearOperator, params: Vector, loss: Tensor | None) -> float:
    """Return the asymmetry that is no cause for alarm."""
    if isinstance(operator, FiniteDifferenceOperator):
        return 0.5  # kinks; beyond it, products are rounding
    eps = coarsest_epsilon(params, loss)
    if params[0].device.type == "cuda":  # where float32 may be multiplied in TF32
        eps = max(eps, 2.0**-10)
    return min(10 * math.sqrt(eps), 0.05)


def _difference(
    problem: Linearization,
    params: Vector,
    v: Vector,
    product: Vector,
    loss: Tensor | None,
    repeat: Callable[[], Tensor] | None,
    tolerance: float,
) -> float:
    if repeat is None or not isinstance(problem.curvature, HessianOperator):
        return math.nan

    def gradient() -> Vector:
        return torch.autograd.grad(repeat(), params, allow_unused=True, materialize_grads=True)

    length = difference_length(params, loss)
    there = moved(gradient, params, v, length)
    found = _distance(product, tuple((a - b) / length for a, b in zip(there, problem.gradient, strict=True)))
    if found <= tolerance:
        return found
    # A step that draws its batch elsewhere, say, cannot be evaluated again.
    again, reach = gradient(), float(norm(problem.gradient)) + float(norm(product)) * length
    change = float(norm(tuple(a - b for a, b in zip(again, problem.gradient, strict=True))))
    if not change <= 1e-2 * reach:
        return math.nan
    length = calibrated_length(gradient, params, v, length)
    here, near = (central_difference(gradient, params, v, length * factor) for factor in (1.0, 0.5))
    found, noise = _distance(product, near), _distance(here, near)
    # Differences that disagree among themselves (kinks, rounding) say nothing.
    return found if found <= tolerance or found > 4 * noise else math.nan


def _distance(first: Vector, second: Vector) -> float:
    size = max(float(norm(first)), float(norm(second)), 1e-300)
    return float(norm(tuple(a - b for a, b in zip(first, second, strict=True)))) / size
