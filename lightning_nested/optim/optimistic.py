"""Optimistic gradient steps: the last gradient predicts the next one.

Daskalakis, Ilyas, Syrgkanis & Zeng (2018), ICLR, "Training GANs with Optimism".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_nested.optim.base import GameOptimizer, PlainOptimizer, Step, by_step
from lightning_nested.optim.kernels.walk import Tensors, add_scaled, each, walk
from lightning_nested.optim.options import decay_rates, flag, non_negative


class OptimisticSGD(PlainOptimizer):
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

    slots = ("previous_grad",)

    def _update(self, options: dict[str, Any], *columns: list[Any]) -> None:
        lr = options["lr"]

        def many(ws: Tensors, es: Tensors, old: Tensors) -> None:
            add_scaled(ws, es, -2 * lr)
            add_scaled(ws, old, lr)
            torch._foreach_copy_(old, es)

        walk(many, *columns, options=options)


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
        moments = {"betas": betas, "eps": eps}
        super().__init__(params, {"lr": lr, **moments, "weight_decay": weight_decay, "maximize": maximize})

    def _update(self, options: dict[str, Any], *columns: list[Any]) -> None:
        params, grads, steps, *moments = columns
        for step, parts in by_step(steps, params, grads, *moments):
            _adam_step(options, step, *parts)


def _adam_step(options: dict[str, Any], step: Step, *columns: list[Tensor]) -> None:
    """Update w, m, v and the last direction d in place with the gradient g, as the step with this number."""
    lr, (beta1, beta2) = options["lr"], options["betas"]
    # d = rate·m/(√v + ε·root)
    root = (1 - beta2**step) ** 0.5
    shift, rate = each(options["eps"] * root, root / (1 - beta1**step))

    def one(w: Tensor, e: Tensor, m: Tensor, v: Tensor, d: Tensor) -> None:
        m.lerp_(e, 1 - beta1)
        v.mul_(beta2).addcmul_(e, e, value=1 - beta2)
        w.add_(d, alpha=lr)
        torch.div(m, v.sqrt().add_(shift), out=d).mul_(rate)
        w.add_(d, alpha=-2 * lr)

    def many(ws: Tensors, es: Tensors, m: Tensors, v: Tensors, d: Tensors) -> None:
        torch._foreach_lerp_(m, es, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, es, es, value=1 - beta2)
        add_scaled(ws, d, lr)
        denominators = torch._foreach_sqrt(v)
        torch._foreach_add_(denominators, shift)
        directions = torch._foreach_div(m, denominators)
        torch._foreach_mul_(directions, rate)
        torch._foreach_copy_(d, directions)
        add_scaled(ws, d, -2 * lr)

    walk(many, *columns, options=options, one=one)
