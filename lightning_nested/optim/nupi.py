"""The νPI controller as an optimizer, for Lagrange multipliers.

Sohrabi, Ramirez, Zhang, Lacoste-Julien & Gallego-Posada (2024), ICML, PMLR 235, arXiv 2406.04558.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from lightning_nested.optim.base import GameOptimizer
from lightning_nested.optim.kernels.walk import Tensors, add_scaled, walk
from lightning_nested.optim.options import decay_rate, flag, non_negative, number


class NuPI(GameOptimizer):
    """ξₜ = νξₜ₋₁ + (1−ν)gₜ, w ← w − lr(gₜ + κ(ξₜ − ξₜ₋₁)), with ξ₋₁ = 0 and κ = ``proportional``.

    For the multipliers of a constrained problem, whose gradient is the violation of their constraint. They ascend the
    Lagrangian: give ``maximize=True`` where your loss is the Lagrangian, and leave it out with ``AugmentedLagrangian``,
    whose loss for the multipliers has the sign already. Summed up, w = w₀ − lr(Σgₜ + κξₜ): a
    controller with an integral gain of lr and a proportional one of κ·lr. The proportional part reacts to the change of
    the violation, which damps the overshoot of gradient ascent.

    κ = 0 is gradient descent. κ = 1 with ν = 0 is :class:`OptimisticSGD`. A negative κ = −ν/(1−ν) at a rate of
    lr/(1−ν) is momentum ν at the rate lr, which overshoots more. The step is that of ``cooper.optim.nuPI`` with
    ``Kp=κ``, ``Ki=1`` and ``init_type=ZEROS`` (its default, ``SGD``, has no proportional part in the first step), but
    for weight decay, which here is part of the gradient.

    Memory: one number per parameter.

    Args:
        params: Parameters or groups; each group may have its own options.
        lr: Learning rate, the integral gain.
        proportional: κ, the proportional gain over the integral one, in steps.
        nu: ν in [0, 1): how much the violation is smoothed for the proportional part; for noisy gradients.
        weight_decay: λ of a penalty ½λ‖w‖², whose gradient λw is added to g (coupled).
        maximize: Ascend. As in torch, weight decay still decays.

    >>> w = torch.tensor([0.0], requires_grad=True)
    >>> optimizer = NuPI([w], lr=0.1, proportional=4.0, maximize=True)
    >>> for violation in (1.0, 0.5):
    ...     w.grad = torch.tensor([violation])
    ...     optimizer.step()
    >>> round(w.item(), 6)  # 0.1·(1 + 0.5) + 0.4·0.5
    0.35
    """

    checks = {  # noqa: RUF012
        "lr": non_negative,
        "proportional": number,
        "nu": decay_rate,
        "weight_decay": non_negative,
        "maximize": flag,
    }
    slots = ("smoothed_grad",)

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        proportional: float = 1.0,
        nu: float = 0.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        gains = {"lr": lr, "proportional": proportional, "nu": nu}
        super().__init__(params, {**gains, "weight_decay": weight_decay, "maximize": maximize})

    def _update(self, options: dict[str, Any], *columns: list[Any]) -> None:
        lr, share = options["lr"], 1 - options["nu"]
        change = options["proportional"] * share  # ξₜ − ξₜ₋₁ = (1−ν)(gₜ − ξₜ₋₁)

        def many(ws: Tensors, es: Tensors, smoothed: Tensors) -> None:
            add_scaled(ws, es, -lr * (1 + change))
            add_scaled(ws, smoothed, lr * change)
            torch._foreach_mul_(smoothed, 1 - share)
            add_scaled(smoothed, es, share)

        walk(many, *columns, options=options)
