"""The mixed derivative by differences, along whichever argument the change is above rounding."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_nested.linalg.curvature import FiniteDifferenceOperator, owned
from lightning_nested.linalg.differences import central_difference, first_length, moved
from lightning_nested.linalg.first_derivatives import first_derivative
from lightning_nested.linalg.shards import added_up
from lightning_nested.linalg.vectors import Vector, double_dot, norm, zeros_where_none

_RESOLVED = 30.0  # units of rounding in a change: fewer, and the product is wrong by more than a few percent
_FEW = 8  # entries that are moved one by one, two gradients each


def mixed_difference(
    loss: Callable[[], Tensor], operator: FiniteDifferenceOperator, params: Vector, v: Vector, hparams: Vector
) -> tuple[Tensor | None, ...]:
    """Return vᵀ ∂²f/∂w∂λ as a central difference of ∂f/∂λ; None where f does not depend on λ.

    Where ∂f/∂λ is large, ‖w‖²/2 of a decay λ say, its change along v may be lost in its rounding. Hyperparameters of
    few entries are then moved instead: (g(w, λ + δ) − g(w, λ − δ))ᵀv/2δ.

    Warns:
        RuntimeWarning: The change is below rounding, and the hyperparameter has too many entries to move each.
    """
    if not hparams:
        return ()
    unseen: set[int] = set()
    slope: list[Vector] = []

    def slopes() -> Vector:
        found = first_derivative(loss(), hparams, params)
        unseen.update(i for i, g in enumerate(found) if g is None)
        slope[:] = [zeros_where_none(found, hparams)]
        return slope[0]

    # Central differences have their least error at about four times the best length of one-sided ones.
    length = operator.length * (4.0 if operator.sides == 1 else 1.0)
    products = list(central_difference(slopes, params, v, length))
    size = float(norm(v))
    move = length / size if size else 0.0
    for i, (product, here) in enumerate(zip(products, slope[0], strict=True)):
        epsilon = torch.finfo(here.dtype).eps
        # Half precision rounds too much for the other way to be better.
        if i in unseen or move == 0.0 or epsilon > 1e-4:
            continue
        change, rounding = 2 * move * product.detach(), _RESOLVED * epsilon * here.detach()
        if here.numel() <= _FEW:
            # Where the parameters are in shards, all processes evaluate gradients together, or none does.
            lost = added_up((change.abs() < rounding.abs()).double(), params).flatten() > 0
            products[i] = _moving_entries(loss, operator.here, params, v, hparams, i, product, lost.tolist())
        elif float(norm((change,))) < float(norm((rounding,))):
            warnings.warn(
                f"The mixed derivative of hyperparameter {i} (of shape {tuple(here.shape)}) is below rounding: moving "
                "the parameters changes ∂f/∂λ by less than its precision. Use curvature=Hessian(), or float64.",
                RuntimeWarning,
                stacklevel=2,
            )
    return tuple(None if i in unseen else product for i, product in enumerate(products))


def _moving_entries(
    loss: Callable[[], Tensor],
    here: Vector | None,
    params: Vector,
    v: Vector,
    hparams: Vector,
    index: int,
    product: Tensor,
    lost: list[bool],
) -> Tensor:
    """Return ``product`` with the lost entries taken from differences of gradients along the hyperparameter.

    ``here`` is the gradient at its current value, where that is known.
    """

    def gradient() -> Vector:
        return owned(first_derivative(loss(), params, hparams), params, ())

    hparam, result = hparams[index], product.clone()
    far = first_length(torch.finfo(hparam.dtype).eps, sides=2)
    for entry in (e for e, is_lost in enumerate(lost) if is_lost):
        unit = torch.zeros_like(hparam.detach()).flatten()
        unit[entry] = 1.0
        direction, home = (unit.view_as(hparam),), hparam.detach().flatten()[entry]

        def slope(up: float, down: float, direction: Vector = direction, home: Tensor = home) -> float:
            ahead = moved(gradient, (hparam,), direction, up)
            behind = here if down == 0.0 and here is not None else moved(gradient, (hparam,), direction, down)
            change = double_dot(tuple(a - b for a, b in zip(ahead, behind, strict=True)), v)
            # What the hyperparameter really moved by, after rounding.
            return float(change) / float((home + up) - (home + down))

        # A decay must not become negative, and is linear: a long move upwards has the least rounding.
        sign = -1.0 if float(home) < 0 else 1.0
        found, half = slope(sign * far, 0.0), slope(sign * far / 2, 0.0)
        if not abs(found - half) <= 0.02 * abs(found) and float(home):
            near = min(far, abs(float(home)) / 16)  # 1/λ is straight only on this length
            found = slope(near, -near)
        result.view(-1)[entry] = found
    return result
