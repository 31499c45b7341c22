"""Optimistic gradient steps: the last gradient predicts the next one.

Daskalakis, Ilyas, Syrgkanis & Zeng (2018), ICLR, "Training GANs with Optimism".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_nested.optim.base import GameOptimizer, Step, by_step, pick
from lightning_nested.optim.kernels.walk import add_scaled, ascent, ascents, each, root_of, walk
from lightning_nested.optim.options import decay_rates, flag, non_negative


class OptimisticSGD(GameOptimizer):
    """w ← w − lr(2gₜ − gₜ₋₁), with g₋₁ = 0.

    One gradient an update. On the bilinear game the rate is √((1 + √(1 − 4lr²))/2) for lr ≤ ½. The first step is twice
    a gradient step, as published.

    Args:
        params: Parameters or groups; each group may have its own options.
        lr: Learning rate α.
        weight_decay: λ of a penalty ½λ‖w‖², whose gradient λw is added to g (coupled).
        maximize: Ascend. As in torch, weight decay still decays.

    Daskalakis, Ilyas, Syrgkanis & Zeng (2018), ICLR, Eq. 5; Popov (1980), Math. Notes 28:845-848.

    >>> w = torch.tensor([1.0], requires_grad=True)
    >>> optimizer = OptimisticSGD([w], lr=0.1)
    >>> for gradient in (1.0, 4.0):
    ...     w.grad = torch.tensor([gradient])
    ...     optimizer.step()
    >>> round(w.item(), 6)  # 1 − 0.1·2 − 0.1·(8 − 1)
    0.1
    """

    checks = {"lr": non_negative, "weight_decay": non_negative, "maximize": flag}  # noqa: RUF012
    slots = ("previous_grad",)

    def __init__(
        self, params: ParamsT, lr: float, weight_decay: float = 0.0, *, maximize: bool = False
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})

    def _update(
        self, options: dict[str, Any], params: list[Tensor], grads: list[Tensor], *columns: list[Any]
    ) -> None:
        optimistic_sgd(params, grads, *columns, **options)


def optimistic_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    previous: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """One step of :class:`OptimisticSGD` on lists of tensors, in place; ``previous`` is gₜ₋₁, then gₜ."""

    def one(w: Tensor, g: Tensor, old: Tensor) -> None:
        g = ascent(w, g, weight_decay, maximize)
        w.add_(g, alpha=-2 * lr).add_(old, alpha=lr)
        old.copy_(g)

    def many(ws: list[Tensor], gs: list[Tensor], old: list[Tensor]) -> None:
        new = ascents(ws, gs, weight_decay, maximize)
        add_scaled(ws, new, -2 * lr)
        add_scaled(ws, old, lr)
        torch._foreach_copy_(old, new)

    walk(one, many, params, grads, previous)


class OptimisticAdam(GameOptimizer):
    """w ← w − lr(2dₜ − dₜ₋₁) with Adam's direction dₜ = m̂ₜ/(√v̂ₜ + ε) and d₀ = 0.

    m and v are Adam's moments, both corrected for their start. One gradient an update; three numbers per parameter.

    Args:
        params: Parameters or groups; each group may have its own options.
        lr: Learning rate α.
        betas: β₁, β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ of a penalty ½λ‖w‖², whose gradient λw is added to g (coupled, as in ``torch.optim.Adam``).
        maximize: Ascend. As in torch, weight decay still decays.

    Daskalakis, Ilyas, Syrgkanis & Zeng (2018), ICLR, Algorithm 1 ("Optimistic Adam"): θₜ = θₜ₋₁ − 2η dₜ + η dₜ₋₁.

    >>> w = torch.tensor([1.0], requires_grad=True)
    >>> optimizer = OptimisticAdam([w], lr=0.1)
    >>> for _ in range(2):  # a constant gradient has d = 1: −2·lr, then −lr
    ...     w.grad = torch.tensor([3.0])
    ...     optimizer.step()
    >>> round(w.item(), 6)
    0.7
    """

    checks = {  # noqa: RUF012
        "lr": non_negative,
        "betas": decay_rates,
        "eps": non_negative,
        "weight_decay": non_negative,
        "maximize": flag,
    }
    slots = ("step", "exp_avg", "exp_avg_sq", "previous_direction")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _update(
        self, options: dict[str, Any], params: list[Tensor], grads: list[Tensor], *columns: list[Any]
    ) -> None:
        steps, *moments = columns
        for step, places in by_step(steps):
            optimistic_adam(*pick(places, params, grads, *moments), step=step, **options)


def optimistic_adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    previous: Sequence[Tensor],
    *,
    step: Step,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """One step of :class:`OptimisticAdam` on lists of tensors, in place; ``previous`` is dₜ₋₁, then dₜ."""
    beta1, beta2 = betas
    # d = rate·m/(√v + ε·root)
    root = root_of(1 - beta2**step)
    shift, rate = each(eps * root, root / (1 - beta1**step))

    def one(w: Tensor, g: Tensor, m: Tensor, v: Tensor, d: Tensor) -> None:
        g = ascent(w, g, weight_decay, maximize)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        w.add_(d, alpha=lr)
        torch.div(m, v.sqrt().add_(shift), out=d).mul_(rate)
        w.add_(d, alpha=-2 * lr)

    def many(ws: list[Tensor], gs: list[Tensor], m: list[Tensor], v: list[Tensor], d: list[Tensor]) -> None:
        new = ascents(ws, gs, weight_decay, maximize)
        torch._foreach_lerp_(m, new, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, new, new, value=1 - beta2)
        add_scaled(ws, d, lr)
        denominators = torch._foreach_sqrt(v)
        torch._foreach_add_(denominators, shift)
        directions = torch._foreach_div(m, denominators)
        torch._foreach_mul_(directions, rate)
        torch._foreach_copy_(d, directions)
        add_scaled(ws, d, -2 * lr)

    walk(one, many, params, grads, averages, squares, previous)
