"""Gradient descent with complex momentum.

Lorraine, Acuna, Vicol & Duvenaud (2022), AISTATS, PMLR 151:7742-7765.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_nested.optim.base import GameOptimizer, by_key
from lightning_nested.optim.kernels.fused import Turn, axpby, run_fused
from lightning_nested.optim.kernels.walk import Tensors, add_scaled, rotate, rotate_all, walk
from lightning_nested.optim.options import angle, coefficient, flag, magnitude, non_negative


class ComplexSGD(GameOptimizer):
    """μ ← βμ − g, w ← w + lr·Re μ, with β = momentum·e^{i·phase}.

    Written out, w ← w − lr Σₖ |β|ᵏ cos(k·phase) g₋ₖ: old gradients come back with the opposite sign, which damps the
    rotation of a game. Phase 0 is classical momentum, exactly ``torch.optim.SGD(momentum=)``; phase π is negative
    momentum; π/8 with |β| ≈ 0.8 is a good first guess for adversarial games, at a price in cooperative ones. The
    opposite phase gives the same iterates.

    The two buffers hold −Re μ and −Im μ, so that ``momentum_buffer`` is the one of ``torch.optim.SGD``, whose
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

    Raises:
        ValueError: An option is out of range, or a loaded state is of SGD with ``nesterov`` or ``dampening``: another
            momentum.

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
        turned = {"momentum": momentum, "phase": phase}
        super().__init__(params, {"lr": lr, **turned, "weight_decay": weight_decay, "maximize": maximize})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # here, and not in load_state_dict: hooks of load_state_dict may replace the state before
        for group in state["param_groups"]:
            if group.get("nesterov") or (group.get("dampening") and group["momentum"]):
                raise ValueError(
                    "A loaded state must be of ComplexSGD, or of torch.optim.SGD with nesterov=False and dampening=0. "
                    f"Got nesterov={group.get('nesterov')} and dampening={group.get('dampening')}; start without it."
                )
        super().__setstate__(state)

    def _update(self, options: dict[str, Any], *columns: list[Any]) -> None:
        for turned, parts in by_key([b is not None for b in columns[3]], *columns):
            _step(options, *(parts if turned else parts[:3]))

    def _begin(self, name: str, p: Tensor, group: dict[str, Any]) -> Tensor | None:
        if name == "momentum_buffer_imag" and not coefficient(group["momentum"], group["phase"])[1]:
            return None
        return super()._begin(name, p, group)


def _step(options: dict[str, Any], *columns: list[Tensor]) -> None:
    """Update w, −Re μ and −Im μ in place with the gradient g; the last column is left out while μ has been real."""
    lr = options["lr"]
    c, s = coefficient(options["momentum"], options["phase"])

    def one(w: Tensor, e: Tensor, a: Tensor, b: Tensor) -> None:
        rotate(e, a, b, c, s)
        w.add_(a, alpha=-lr)

    def many(ws: Tensors, es: Tensors, a: Tensors, b: Tensors | None = None) -> None:
        if b is None:
            torch._foreach_mul_(a, c)
            torch._foreach_add_(a, es)
        else:
            rotate_all(es, a, b, c, s)
        add_scaled(ws, a, -lr)

    is_complex = len(columns) == 4
    kernel, turn = None, Turn.of(c, s)
    if is_complex and turn is not None:
        decay = {"weight_decay": options["weight_decay"], "maximize": options["maximize"]}
        grow = 1 / turn.scale

        def fused(ws: list[Tensor], gs: list[Tensor], a: list[Tensor], b: list[Tensor]) -> None:
            turn(a, b)
            axpby(ws, gs, a, x=grow, rate=lr, **decay)

        kernel = partial(run_fused, fused)
    walk(many, *columns, options=options, one=one if is_complex else None, kernel=kernel)
