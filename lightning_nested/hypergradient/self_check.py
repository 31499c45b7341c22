"""Check of products with the curvature at one point: of those that a solver has formed, or of one on request."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_nested.hypergradient.inner_curvature import Linearization
from lightning_nested.linalg.curvature import (
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    HessianOperator,
    owned,
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
from lightning_nested.linalg.vectors import Vector, add_, clone, double_dot, norm, scale_

# Relative. A difference of gradients adds up kinks that it passes, which a second derivative at one point does not see.
SMOOTH, _KINKED = 0.05, 0.3
_PARALLEL = 0.999  # cosine
CLEAR = 4.0  # times as far from a product as differences are from each other: the product is wrong
_PIECE = 2**16  # entries

Pair: TypeAlias = tuple[Vector, Vector]
"""A vector v and its product Av."""

_KINKS = re.compile(
    r"Relu|Hardtanh|Hardsw|Hardsig|Threshold|MaxPool|Clamp|Abs|Maximum|Minimum|L1Loss|Huber|Where|Sort|TopK"
)


@dataclass(frozen=True, kw_only=True)
class ProductCheck:
    """Result of :func:`check_products` or :func:`check_formed_products`; NaN where nothing could be compared."""

    asymmetry: float = math.nan  # |uᵀAv − vᵀAu|, relative to what it is where A is not symmetric at all
    difference: float = math.nan  # ‖Av − (g(w + εv) − g(w))/ε‖, relative to the longer of both
    tolerance: float = SMOOTH  # difference up to which products are right, more where the loss has kinks
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
    if not _is_known(operator) or size == 0.0 or not math.isfinite(size):
        return ProductCheck()
    v = tuple(a / size for a in v)  # half precision has little range
    pair = v, operator.matvec(v)
    if not _has_length(pair):  # the solver says so
        return ProductCheck()
    tolerance, difference = smooth_or_kinked(loss), math.nan
    if repeat is not None and isinstance(operator, HessianOperator):
        gradient = gradient_of(repeat, params)
        difference = _difference(problem, params, pair, gradient, loss, tolerance)
        if math.isnan(difference):
            difference = _measured_difference(problem, params, pair, gradient, loss, tolerance)
    pairs = [pair] if difference <= tolerance else [pair, _random_pair(operator, v)]
    return _found(operator, params, loss, pairs, difference, tolerance)


class FormedProducts(LinearOperator):
    """A curvature that keeps some of the products that a solver forms with it, which are those of it bit for bit.

    Args:
        operator: The curvature.
        outer_gradient: Right-hand side of the solve.
        others: Products to keep beside the one with the outer gradient. Copies cost: memory that is touched for the
            first time takes as long as a pass through a small network.

    Attributes:
        first: The first ones, of a power iteration say.
        outer: The one with the outer gradient, where products matter; None before it is formed.
    """

    def __init__(self, operator: LinearOperator, outer_gradient: Vector, *, others: int = 2) -> None:
        self.operator, self.symmetric, self.like = operator, operator.symmetric, operator.like
        self.outer_gradient, self._others = outer_gradient, others
        self.first: list[Pair] = []
        self.outer: Pair | None = None

    def matvec(self, v: Vector) -> Vector:
        """A v."""
        product = self.operator.matvec(v)
        b = self.outer_gradient
        if self.outer is None and all(map(torch.equal, v, b)):
            self.outer = b, clone(product)
            self.first = self.first[: self._others]
        elif len(self.first) < max(self._others, self.outer is None):
            self.first.append((clone(v), clone(product)))  # solvers overwrite theirs
        return product

    @property
    def pairs(self) -> list[Pair]:
        """Return what was kept, the product that matters most last."""
        kept = self.first if self.outer is None else [*self.first, self.outer]
        return [pair for pair in kept if _has_length(pair)]


def check_formed_products(
    problem: Linearization,
    params: Vector,
    formed: FormedProducts,
    *,
    loss: Tensor | None = None,
    repeat: Callable[[], Tensor] | None = None,
) -> ProductCheck:
    """Compare a product that a solver has formed with a difference of gradients, or with another product.

    One gradient, or two where the first leaves doubt, and one product where they disagree; none of them where the loss
    cannot be evaluated again. Otherwise as :func:`check_products`.
    """
    pairs = formed.pairs
    if not pairs or not _is_known(formed.operator):
        return ProductCheck()
    tolerance, difference = smooth_or_kinked(loss), math.nan
    if repeat is not None and isinstance(formed.operator, HessianOperator):
        difference = _difference(problem, params, pairs[-1], gradient_of(repeat, params), loss, tolerance)
        if math.isnan(difference) and len(pairs) == 1:
            pairs.append(_random_pair(formed.operator, pairs[0][0]))
    return _found(formed.operator, params, loss, pairs, difference, tolerance)


def _is_known(operator: LinearOperator) -> bool:
    return isinstance(operator, HessianOperator | GaussNewtonOperator | FiniteDifferenceOperator)


def _has_length(pair: Pair) -> bool:
    """Return True if v and Av are finite, and v is not zero."""
    size, product = (float(norm(a)) for a in pair)
    return size > 0.0 and math.isfinite(size) and math.isfinite(product)


def smooth_or_kinked(loss: Tensor | None) -> float:
    """Return the difference up to which products are right."""
    return _KINKED if any(_KINKS.search(node.name()) for node in graph_nodes([loss])) else SMOOTH


def _random_pair(operator: LinearOperator, like: Vector) -> Pair:
    """Return a random unit vector and its product."""
    generator = torch.Generator().manual_seed(0)
    u = tuple(torch.randn(a.shape, generator=generator).to(a) for a in like)
    length = float(norm(u))
    u = tuple(a / length for a in u)
    return u, operator.matvec(u)


def _found(
    operator: LinearOperator,
    params: Vector,
    loss: Tensor | None,
    pairs: Sequence[Pair],
    difference: float,
    tolerance: float,
) -> ProductCheck:
    # Products that are those of differences are symmetric.
    others = () if difference <= tolerance else pairs[1:]
    found = (_asymmetry(pairs[0], pair) for pair in others)
    return ProductCheck(
        asymmetry=max((a for a in found if not math.isnan(a)), default=math.nan),
        difference=difference,
        tolerance=tolerance,
        noise=_noise(operator, params, loss),
    )


def _asymmetry(first: Pair, second: Pair) -> float:
    """Return |uᵀAv − vᵀAu| of u and v, made orthogonal, relative to the size that it has where A is not symmetric."""
    (v, av), (u, au) = first, second
    size = float(norm(v))
    share = float(double_dot(u, v)) / size**2
    if abs(share) * size > _PARALLEL * float(norm(u)):
        return math.nan
    u, au = (tuple(a - share * b for a, b in zip(x, y, strict=True)) for x, y in ((u, v), (au, av)))
    lengths = float(norm(u)) * size
    there, back = float(double_dot(u, av)) / lengths, float(double_dot(v, au)) / lengths
    root = math.sqrt(sum(a.numel() for a in v))
    sizes = float(norm(au)) * size / lengths, float(norm(av)) / size
    # A unit vector that has nothing to do with a product of length ‖Av‖ sees ‖Av‖/√n of it.
    scale = max(abs(there), abs(back), min(sizes) + max(sizes) / root)
    return abs(there - back) / scale if scale > 0 else math.nan


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
    pair: Pair,
    gradient: Callable[[], Vector],
    loss: Tensor | None,
    tolerance: float,
) -> float:
    """Return the distance of a product from a difference of gradients, by one gradient or two.

    NaN where the differences to both sides disagree: the move was too long or too short for them, a kink lay in its
    way, or the step draws its batch elsewhere and cannot be evaluated again.
    """
    (v, product), length = pair, difference_length(params, loss)
    side = one_sided(gradient, params, v, problem.gradient, length)
    ahead = side(1.0)
    if (found := distance(product, ahead)) <= tolerance:
        return found
    return two_sided(product, ahead, side(-1.0), tolerance)


def one_sided(
    function: Callable[[], Vector], params: Vector, v: Vector, here: Vector, length: float
) -> Callable[[float], Vector]:
    """Return the one-sided differences along v of a function that is ``here`` at the parameters."""
    size = float(norm(v))

    def side(sign: float) -> Vector:
        there = moved(function, params, v, sign * length / size)
        return scale_(add_(there, here, alpha=-1.0), size / (sign * length))

    return side


def two_sided(product: Vector, ahead: Vector, behind: Vector, tolerance: float) -> float:
    """Return the distance of a product from the mean of differences to both sides; NaN where these say nothing."""
    found = distance(product, tuple((a + b) / 2 for a, b in zip(ahead, behind, strict=True)))
    # Sides that disagree (kinks, rounding) say nothing.
    return found if found <= tolerance or found > CLEAR * distance(ahead, behind) else math.nan


def _measured_difference(
    problem: Linearization,
    params: Vector,
    pair: Pair,
    gradient: Callable[[], Vector],
    loss: Tensor | None,
    tolerance: float,
) -> float:
    """Return the same by central differences whose length is measured."""
    (v, product), length = pair, difference_length(params, loss)
    again, reach = gradient(), float(norm(problem.gradient)) + float(norm(product)) / float(norm(v)) * length
    change = float(norm(tuple(a - b for a, b in zip(again, problem.gradient, strict=True))))
    if not change <= 1e-2 * reach:
        return math.nan
    length = calibrated_length(gradient, params, v, length)
    here, near = (central_difference(gradient, params, v, length * factor) for factor in (1.0, 0.5))
    found, noise = distance(product, near), distance(here, near)
    # Differences that disagree among themselves (kinks, rounding) say nothing.
    return found if found <= tolerance or found > CLEAR * noise else math.nan


def gradient_of(repeat: Callable[[], Tensor], params: Vector) -> Callable[[], Vector]:
    """Return what gives the gradient, in tensors of its own."""

    def gradient() -> Vector:
        found = torch.autograd.grad(repeat(), params, allow_unused=True)
        return owned(found, params, ())

    return gradient


def distance(first: Vector, second: Vector) -> float:
    """Return ‖a − b‖, relative to the longer of both."""
    size = max(float(norm(first)), float(norm(second)), 1e-300)
    # In pieces that stay in the cache: new memory of the size of the network takes longer than the arithmetic.
    pieces = (
        (a, b)
        for x, y in zip(first, second, strict=True)
        for a, b in zip(*(torch.split(t.flatten(), _PIECE) for t in (x, y)), strict=True)
    )
    return float(norm(tuple(norm((a - b,)) for a, b in pieces))) / size
