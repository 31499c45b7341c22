"""Gradient descent with complex momentum.

Lorraine, Acuna, Vicol & Duvenaud (2022), AISTATS, PMLR 151:7742-7765.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_nested.optim.base import GameOptimizer, pick
from lightning_nested.optim.kernels.fused import Fused, Turn, axpby
from lightning_nested.optim.kernels.walk import add_scaled, ascent, ascents, walk
from lightning_nested.optim.options import angle, coefficient, flag, magnitude, non_negative


class ComplexSGD(GameOptimizer):
    """μ ← βμ − g, w ← w + lr·Re μ, with β = momentum·e^{i·phase}.

    Written out, w ← w − lr Σₖ |β|ᵏ cos(k·phase) g₋ₖ: old gradients come back with the opposite sign, which damps the
    rotation of a game. Phase 0 is classical momentum, exactly ``torch.optim.SGD(momentum=)``; phase π is negative
    momentum; π/8 with |β| ≈ 0.8 is a good first guess for adversarial games, at a price in cooperative ones. The
    opposite phase gives the same iterates.

    The two buffers hold −Re μ and −Im μ, so that ``momentum_buffer`` is that of ``torch.optim.SGD``, whose
    ``state_dict`` loads here. While the phase has only ever been 0 or π, there is no second one. The learning rate is
    applied at the step, as in torch: after a scheduler's change it holds for old gradients too.

    Memory: two numbers per parameter. Differences to torch: no ``dampening``, no ``nesterov``.

    Args:
        params: Parameters or groups; each group may have its own options.
        lr: Learning rate α.
        momentum: |β| in [0, 1).
        phase: arg β in radians, in [−π, π].
        weight_decay: λ of a penalty ½λ‖w‖², whose gradient λw is added to g (coupled: it enters the momentum).
        maximize: Ascend. As in torch, weight decay still decays.

    Lorraine, Acuna, Vicol & Duvenaud (2022), AISTATS, PMLR 151:7742-7765.

    >>> x = torch.tensor([1.0], requires_grad=True)
    >>> y = torch.tensor([1.0], requires_grad=True)
    >>> optimizer = ComplexSGD([x, y], lr=0.1, momentum=0.8, phase=math.pi / 8)
    >>> for _ in range(200):  # min over x, max over y of xy, where momentum=0.8 alone diverges
    ...     x.grad, y.grad = y.detach().clone(), -x.detach().clone()
    ...     optimizer.step()
    >>> bool(x.abs() < 0.05 and y.abs() < 0.05)
    True
    """

    checks = {  # noqa: RUF012
        "lr": non_negative,
        "momentum": magnitude,
        "phase": angle,
        "weight_decay": non_negative,
        "maximize": flag,
    }

    slots = ("momentum_buffer", "momentum_buffer_imag")

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.8,
        phase: float = math.pi / 8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "phase": phase,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of ``torch.optim.SGD``.

        Raises:
            ValueError: SGD had ``nesterov`` or ``dampening``: another momentum.
        """
        for group in state_dict["param_groups"]:
            if group.get("nesterov") or (group.get("dampening") and group["momentum"]):
                raise ValueError(
                    "A loaded state must be of ComplexSGD, or of torch.optim.SGD with nesterov=False and dampening=0. "
                    f"Got nesterov={group.get('nesterov')} and dampening={group.get('dampening')}; start without it."
                )
        super().load_state_dict(state_dict)

    def _update(
        self, options: dict[str, Any], params: list[Tensor], grads: list[Tensor], *columns: list[Any]
    ) -> None:
        real, imag = columns
        turned = [i for i, b in enumerate(imag) if b is not None]
        others = [i for i, b in enumerate(imag) if b is None]
        if turned:
            complex_sgd(*pick(turned, params, grads, real, imag), **options)
        if others:
            ws, gs, a = pick(others, params, grads, real)
            complex_sgd(ws, gs, a, None, **options)

    def _begin(self, name: str, p: Tensor, group: dict[str, Any]) -> Tensor | None:
        if name == "momentum_buffer_imag" and not coefficient(group["momentum"], group["phase"])[1]:
            return None
        return super()._begin(name, p, group)


def complex_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    real: Sequence[Tensor],
    imag: Sequence[Tensor] | None,
    *,
    lr: float,
    momentum: float,
    phase: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """One step of :class:`ComplexSGD` on lists of tensors, in place.

    Args:
        params: w.
        grads: g; not changed.
        real: −Re μ.
        imag: −Im μ; None when it is zero and β is real.
        lr: α.
        momentum: |β|.
        phase: arg β.
        weight_decay: λ.
        maximize: Ascend.
    """
    c, s = coefficient(momentum, phase)

    def one(w: Tensor, g: Tensor, a: Tensor, b: Tensor | None = None) -> None:
        g = ascent(w, g, weight_decay, maximize)
        if b is None:
            a.mul_(c).add_(g)
        else:  # a, b ← c·a − s·b + g, s·a + c·b: four calls, one temporary
            new = torch.add(g, b, alpha=-s)
            b.mul_(c).add_(a, alpha=s)
            torch.add(new, a, alpha=c, out=a)
        w.add_(a, alpha=-lr)

    def many(ws: list[Tensor], gs: list[Tensor], a: list[Tensor], b: list[Tensor] | None = None) -> None:
        new = ascents(ws, gs, weight_decay, maximize)
        if b is None:
            torch._foreach_mul_(a, c)
            torch._foreach_add_(a, new)
        else:
            new = torch._foreach_add(new, b, alpha=-s)
            torch._foreach_mul_(b, c)
            torch._foreach_add_(b, a, alpha=s)
            torch._foreach_add_(new, a, alpha=c)
            torch._foreach_copy_(a, new)
        add_scaled(ws, a, -lr)

    if imag is None:
        walk(one, many, params, grads, real)
        return
    kernel = None
    turn = Turn.of(c, s)
    if turn is not None:
        grow = 1 / turn.scale

        def fused(ws: list[Tensor], gs: list[Tensor], a: list[Tensor], b: list[Tensor]) -> None:
            turn(a, b)
            axpby(ws, gs, a, x=grow, rate=lr, weight_decay=weight_decay, maximize=maximize)

        kernel = Fused(fused)
    walk(one, many, params, grads, real, imag, kernel=kernel)
