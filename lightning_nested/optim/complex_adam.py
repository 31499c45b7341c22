"""Adam whose first moment has a complex decay.

Lorraine, Acuna, Vicol & Duvenaud (2022), AISTATS, PMLR 151:7742-7765.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_nested.optim.base import GameOptimizer, Step, by_step, pick
from lightning_nested.optim.kernels.fused import Fused, Turn
from lightning_nested.optim.kernels.walk import add_quotients, ascent, ascents, each, root_of, walk
from lightning_nested.optim.options import angle, coefficient, complex_decay_rates, flag, non_negative


class ComplexAdam(GameOptimizer):
    """μ ← β₁μ − g, v ← β₂v + (1 − β₂)g², w ← w + lr·Re μ/(√v̂ + ε), with v̂ = v/(1 − β₂ᵗ).

    β₁ = betas[0]·e^{i·phase}; only the first moment is complex. As the method is published it has neither Adam's
    factor 1 − β₁ nor a correction of the first moment, so that at the same ``lr`` a step is about |1/(1 − β₁)| times
    Adam's. ``debias=True`` gives both: w ← w + lr·Re(κμ)/(√v̂ + ε) with κ = (1 − β₁)/(1 − β₁ᵗ), which returns a
    constant gradient unchanged at every t. With phase 0 that is ``torch.optim.Adam``, whose ``state_dict`` loads
    here. The opposite phase gives the same iterates.

    The buffers hold −Re μ, −Im μ and v: three numbers per parameter. ``betas=(0, 0.999)`` is accepted.

    Args:
        params: Parameters or groups; each group may have its own options.
        lr: Learning rate α.
        betas: |β₁| and β₂, each in [0, 1).
        phase: arg β₁ in radians, in [−π, π].
        eps: ε.
        weight_decay: λ of a penalty ½λ‖w‖², whose gradient λw is added to g (coupled, as in ``torch.optim.Adam``; not
            AdamW).
        debias: Adam's factor and correction of the first moment.
        maximize: Ascend. As in torch, weight decay still decays.

    Lorraine, Acuna, Vicol & Duvenaud (2022), AISTATS, PMLR 151:7742-7765.

    >>> w = torch.tensor([1.0], requires_grad=True)
    >>> w.grad = torch.tensor([3.0])
    >>> ComplexAdam([w], lr=0.25).step()  # the first step is lr·sign(g), at every phase
    >>> round(w.item(), 6)
    0.75
    """

    checks = {  # noqa: RUF012
        "lr": non_negative,
        "betas": complex_decay_rates,
        "phase": angle,
        "eps": non_negative,
        "weight_decay": non_negative,
        "debias": flag,
        "maximize": flag,
    }

    slots = ("step", "momentum_buffer", "momentum_buffer_imag", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.8, 0.999),
        phase: float = math.pi / 8,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        debias: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "phase": phase,
            "eps": eps,
            "weight_decay": weight_decay,
            "debias": debias,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of ``torch.optim.Adam``: its first moment is (1 − β₁) times ours.

        Raises:
            ValueError: Adam had ``amsgrad``, or weight decay as in AdamW.
        """
        super().load_state_dict(_from_adam(state_dict))

    def _update(
        self, options: dict[str, Any], params: list[Tensor], grads: list[Tensor], *columns: list[Any]
    ) -> None:
        steps, *moments = columns
        for step, places in by_step(steps):
            complex_adam(*pick(places, params, grads, *moments), step=step, **options)


def _from_adam(saved: dict[str, Any]) -> dict[str, Any]:
    """The state with a ``momentum_buffer`` for every ``exp_avg``; the given one stays as it is."""
    states = dict(saved["state"])
    for group in saved["param_groups"]:
        for key in group["params"]:
            state = states.get(key, {})
            if "exp_avg" not in state:
                continue
            if group.get("amsgrad") or (group.get("decoupled_weight_decay") and group["weight_decay"]):
                raise ValueError(
                    "A loaded state must be of ComplexAdam, or of torch.optim.Adam without amsgrad and without "
                    "decoupled weight decay, which ComplexAdam does not have. Got one with; start without it."
                )
            rest = {name: value for name, value in state.items() if name != "exp_avg"}
            states[key] = {**rest, "momentum_buffer": state["exp_avg"] / (1 - float(group["betas"][0]))}
    return {**saved, "state": states}


def complex_adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    real: Sequence[Tensor],
    imag: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    step: Step,
    lr: float,
    betas: tuple[float, float],
    phase: float,
    eps: float,
    weight_decay: float = 0.0,
    debias: bool = False,
    maximize: bool = False,
) -> None:
    """One step of :class:`ComplexAdam` on lists of tensors, in place.

    Args:
        params: w.
        grads: g; not changed.
        real: −Re μ.
        imag: −Im μ.
        squares: v.
        step: t ≥ 1, of this step; a vector of them where torch.compile traces.
        lr: α.
        betas: |β₁|, β₂.
        phase: arg β₁.
        eps: ε.
        weight_decay: λ.
        debias: Factor and correction of the first moment.
        maximize: Ascend.
    """
    c, s = coefficient(betas[0], phase)
    # √v̂ + ε = (√v + ε·root)/root: one operation fewer per element
    root = root_of(1 - betas[1] ** step)
    factor = _factor(c, s, betas[0], phase, step) if debias else (1.0, 0.0)
    both = (-lr * root * factor[0], lr * root * factor[1])
    shift, *rates = each(eps * root, *(both if s and debias else both[:1]))

    def one(w: Tensor, g: Tensor, a: Tensor, b: Tensor, v: Tensor) -> None:
        g = ascent(w, g, weight_decay, maximize)
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        new = torch.add(g, b, alpha=-s)  # a, b ← c·a − s·b + g, s·a + c·b: four calls, one temporary
        b.mul_(c).add_(a, alpha=s)
        torch.add(new, a, alpha=c, out=a)
        denominator = torch.sqrt(v, out=new).add_(shift)
        for x, rate in zip((a, b), rates, strict=False):
            w.addcdiv_(x, denominator, value=rate)

    def many(ws: list[Tensor], gs: list[Tensor], a: list[Tensor], b: list[Tensor], v: list[Tensor]) -> None:
        new = ascents(ws, gs, weight_decay, maximize)
        torch._foreach_mul_(v, betas[1])
        torch._foreach_addcmul_(v, new, new, value=1 - betas[1])
        new = torch._foreach_add(new, b, alpha=-s)
        torch._foreach_mul_(b, c)
        torch._foreach_add_(b, a, alpha=s)
        torch._foreach_add_(new, a, alpha=c)
        torch._foreach_copy_(a, new)
        denominators = torch._foreach_sqrt(v)
        torch._foreach_add_(denominators, shift)
        for xs, rate in zip((a, b), rates, strict=False):
            add_quotients(ws, xs, denominators, rate)

    kernel = None
    turn = Turn.of(c, s)
    if not isinstance(step, Tensor) and turn is not None and c > 0 and abs(factor[1]) <= 2 * factor[0]:
        kernel = Fused(
            _fused(turn, factor, step, lr, betas[1], eps, weight_decay=weight_decay, maximize=maximize)
        )
    walk(one, many, params, grads, real, imag, squares, kernel=kernel)


def _fused(
    turn: Turn, factor: tuple[float, float], step: float, lr: float, beta2: float, eps: float, **options: Any
) -> Callable[..., None]:
    """The update with Adam's kernel: m ← (1 − β)(a/σ + g) for β = 1/(1 + σ), w ← w − r·m/((1 − βᵗ)(√v̂ + ε)).

    Where κ has an imaginary part, a is moved along b for that time, so that m is in the direction of Re(κμ).
    """
    beta = 1 / (1 + turn.scale)
    tilt = factor[1] / factor[0]
    rate = lr * factor[0] * (1 - beta**step) / (1 - beta)
    count = torch.tensor(step)

    def update(ws: list[Tensor], gs: list[Tensor], a: list[Tensor], b: list[Tensor], v: list[Tensor]) -> None:
        turn(a, b)
        if tilt:
            torch._foreach_add_(a, b, alpha=-turn.scale * tilt)
        torch._fused_adam_(
            ws,
            gs,
            a,
            v,
            [],
            [count] * len(ws),
            lr=rate,
            beta1=beta,
            beta2=beta2,
            eps=eps,
            amsgrad=False,
            **options,
        )
        torch._foreach_mul_(a, 1 / (1 - beta))
        if tilt:
            torch._foreach_add_(a, b, alpha=tilt)

    return update


def _factor(c: float, s: float, momentum: float, phase: float, step: Any) -> tuple[Any, Any]:
    """Re κ and Im κ of κ = (1 − β)/(1 − βᵗ); its denominator is at least 1 − |β|ᵗ > 0 in size."""
    if not s:
        return (1 - c) / (1 - c**step), 0.0
    cos, sin = (torch.cos, torch.sin) if isinstance(step, Tensor) else (math.cos, math.sin)
    power = momentum**step
    real, imag = 1 - power * cos(phase * step), -power * sin(phase * step)
    square = real * real + imag * imag
    return ((1 - c) * real - s * imag) / square, -(s * real + (1 - c) * imag) / square
