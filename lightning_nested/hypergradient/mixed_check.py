"""Check of the mixed derivative that a hypergradient is made of, by differences that take no second derivative."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_nested.hypergradient.self_check import (
    CLEAR,
    SMOOTH,
    distance,
    gradient_of,
    one_sided,
    smooth_or_kinked,
    two_sided,
)
from lightning_nested.linalg.differences import coarsest_epsilon, difference_length
from lightning_nested.linalg.vectors import Vector, norm, zeros_where_none

_FAR = 4.0  # moves of a further pair of differences, in lengths of the first
_ROUNDED = 16.0  # rounding of a derivative, in machine epsilons


class FormedMixed:
    """The product vᵀ ∂²f/∂w∂λ of a linearized loss, which keeps the first one that is formed.

    Args:
        mixed: See :class:`Linearization`.

    Attributes:
        first: v, the hyperparameters λ and the product; None before it is formed.
    """

    def __init__(self, mixed: Callable[[Vector, Vector], tuple[Tensor | None, ...]]) -> None:
        self._mixed = mixed
        self.first: tuple[Vector, Vector, tuple[Tensor | None, ...]] | None = None

    def __call__(self, v: Vector, hparams: Vector) -> tuple[Tensor | None, ...]:
        """Return vᵀ ∂²f/∂w∂λ."""
        product = self._mixed(v, hparams)
        if self.first is None and hparams:
            self.first = v, hparams, product
        return product


def wrong_mixed(
    params: Vector, formed: FormedMixed, *, loss: Tensor, repeat: Callable[[], Tensor]
) -> dict[int, float]:
    """Compare vᵀ ∂²f/∂w∂λ with (∂f/∂λ(w + εv) − ∂f/∂λ(w))/ε, which takes no second derivative.

    Takes ∂f/∂λ through the loss's kept graph and one evaluation of the loss, a second one where the first leaves
    doubt. A product with no more than rounding of ∂f/∂λ in it is not compared. One with no more than rounding of f
    (λ is very weak, or terms of ∂f/∂λ cancel) is wrong only if two more evaluations, further off, confirm it.

    Args:
        params: The parameters w.
        formed: The product that the hypergradient is made of.
        loss: f with its graph, which is kept.
        repeat: Evaluates f again, as in :func:`check_products`.

    Returns:
        Relative difference of each hyperparameter whose product is wrong, by its index.
    """
    if formed.first is None:
        return {}
    v, hparams, product = formed.first
    size = float(norm(v))
    here = torch.autograd.grad(loss, hparams, retain_graph=True, allow_unused=True)
    seen = [i for i, g in enumerate(here) if g is not None]
    if not seen or not 0.0 < size < math.inf:
        return {}
    live = tuple(hparams[i] for i in seen)
    base = tuple(g.clone() for g in here if g is not None)
    products = zeros_where_none([product[i] for i in seen], live)
    length, tolerance = difference_length(params, loss), smooth_or_kinked(loss)
    side = one_sided(gradient_of(repeat, live), params, v, base, length)
    epsilon = _ROUNDED * coarsest_epsilon(params, loss)
    value, sizes = abs(float(loss.detach())), [float(norm((b,))) for b in base]
    rounding = epsilon * size / length

    def differs(k: int, difference: Tensor, around: float) -> bool:
        return float(norm((products[k] - difference,))) > rounding * around

    ahead = side(1.0)
    doubtful = [
        k
        for k, (m, d) in enumerate(zip(products, ahead, strict=True))
        if not distance((m,), (d,)) <= tolerance and differs(k, d, sizes[k])
    ]
    behind = side(-1.0) if doubtful else ahead
    near = {k: (ahead[k] + behind[k]) / 2 for k in doubtful}
    found = {
        k: two_sided((products[k],), (ahead[k],), (behind[k],), tolerance)
        for k in doubtful
        if differs(k, near[k], sizes[k])
    }
    found = {k: difference for k, difference in found.items() if difference > tolerance}
    # A derivative whose terms cancel says nothing of their rounding; the loss does.
    small = [k for k in found if sizes[k] <= epsilon * value and not differs(k, near[k], value)]
    if small:
        far = side(_FAR), side(-_FAR)
        for k in small:
            if not _agree((ahead[k], behind[k]), (far[0][k], far[1][k])):
                del found[k]
    return {seen[k]: difference for k, difference in found.items()}


def _agree(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> bool:
    """Return True if differences to both sides, near and far, are of one derivative; rounding differs among them."""
    first, second = ((a + b) / 2 for a, b in (near, far))
    sides = max(distance((a,), (b,)) for a, b in (near, far))
    return bool(first.any()) and distance((first,), (second,)) <= SMOOTH and sides * CLEAR <= 1.0
