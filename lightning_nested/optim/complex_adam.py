"""Adam whose first moment has a complex decay.

Lorraine, Acuna, Vicol & Duvenaud (2022), AISTATS, PMLR 151:7742-7765.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_nested.optim.base import GameOptimizer, Step, by_step
from lightning_nested.optim.kernels.fused import Turn, run_fused
from lightning_nested.optim.kernels.walk import Tensors, add_quotients, each, rotate, rotate_all, walk
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

    Raises:
        ValueError: An option is out of range, or a loaded state is of Adam with ``amsgrad``, or with weight decay as in
            AdamW.

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
        moments = {"betas": betas, "phase": phase, "eps": eps, "debias": debias}
        super().__init__(params, {"lr": lr, **moments, "weight_decay": weight_decay, "maximize": maximize})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # here, and not in load_state_dict: hooks of load_state_dict may replace the state before
        super().__setstate__(_from_adam(state))

    def _update(self, options: dict[str, Any], *columns: list[Any]) -> None:
        params, grads, steps, *moments = columns
        for step, parts in by_step(steps, params, grads, *moments):
            _step(options, step, *parts)


def _from_adam(loaded: dict[str, Any]) -> dict[str, Any]:
    """Return the state with a ``momentum_buffer`` for every ``exp_avg``: Adam's first moment is (1 − β₁) times ours."""
    states = defaultdict(dict, loaded["state"])
    for group in loaded["param_groups"]:
        for p in group["params"]:
            if "exp_avg" not in states.get(p, {}):
                continue
            if group.get("amsgrad") or (group.get("decoupled_weight_decay") and group["weight_decay"]):
                raise ValueError(
                    "A loaded state must be of ComplexAdam, or of torch.optim.Adam without amsgrad and without "
                    "decoupled weight decay, which ComplexAdam does not have. Got one with; start without it."
                )
            rest = {name: value for name, value in states[p].items() if name != "exp_avg"}
            states[p] = {**rest, "momentum_buffer": states[p]["exp_avg"] / (1 - float(group["betas"][0]))}
    return {**loaded, "state": states}


def _step(options: dict[str, Any], step: Step, *columns: list[Tensor]) -> None:
    """Update w, −Re μ, −Im μ and v in place with the gradient g, as the step with this number."""
    lr, (momentum, beta2), debias = options["lr"], options["betas"], options["debias"]
    c, s = coefficient(momentum, options["phase"])
    # √v̂ + ε = (√v + ε·root)/root: one operation fewer per element
    root = (1 - beta2**step) ** 0.5
    factor = correction(c, s, momentum, options["phase"], step) if debias else (1.0, 0.0)
    both = (-lr * root * factor[0], lr * root * factor[1])
    shift, *rates = each(options["eps"] * root, *(both if s and debias else both[:1]))

    def one(w: Tensor, e: Tensor, a: Tensor, b: Tensor, v: Tensor) -> None:
        v.mul_(beta2).addcmul_(e, e, value=1 - beta2)
        free = rotate(e, a, b, c, s)
        denominator = torch.sqrt(v, out=free).add_(shift)
        for x, rate in zip((a, b), rates, strict=False):
            w.addcdiv_(x, denominator, value=rate)

    def many(ws: Tensors, es: Tensors, a: Tensors, b: Tensors, v: Tensors) -> None:
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, es, es, value=1 - beta2)
        rotate_all(es, a, b, c, s)
        denominators = torch._foreach_sqrt(v)
        torch._foreach_add_(denominators, shift)
        for xs, rate in zip((a, b), rates, strict=False):
            add_quotients(ws, xs, denominators, rate)

    kernel, turn = None, Turn.of(c, s)
    if not isinstance(step, Tensor) and turn is not None and c > 0 and abs(factor[1]) <= 2 * factor[0]:
        kernel = partial(run_fused, _fused(options, turn, factor, step))
    walk(many, *columns, options=options, one=one, kernel=kernel)


def _fused(
    options: dict[str, Any], turn: Turn, factor: tuple[float, float], step: float
) -> Callable[..., None]:
    """Return the update with Adam's kernel: m ← (1 − β)(a/σ + g) for β = 1/(1 + σ), w ← w − r·m/((1 − βᵗ)(√v̂ + ε)).

    Where κ has an imaginary part, a is moved along b during the call, so that m is in the direction of Re(κμ).
    """
    beta = 1 / (1 + turn.scale)
    tilt = factor[1] / factor[0]
    adam = {name: options[name] for name in ("eps", "weight_decay", "maximize")}
    adam |= {"beta1": beta, "beta2": options["betas"][1], "amsgrad": False}
    adam["lr"] = options["lr"] * factor[0] * (1 - beta**step) / (1 - beta)
    count = torch.tensor(step)
    # as tensors: a number would become one again for each parameter
    factors = {dtype: torch.tensor(1 / (1 - beta), dtype=dtype) for dtype in (torch.float32, torch.float64)}

    def update(ws: list[Tensor], gs: list[Tensor], a: list[Tensor], b: list[Tensor], v: list[Tensor]) -> None:
        turn(a, b)
        if tilt:
            torch._foreach_add_(a, b, alpha=-turn.scale * tilt)
        torch._fused_adam_(ws, gs, a, v, [], [count] * len(ws), **adam)
        torch._foreach_mul_(a, factors[a[0].dtype])
        if tilt:
            torch._foreach_add_(a, b, alpha=tilt)

    return update


def correction(c: float, s: float, momentum: float, phase: float, step: Any) -> tuple[Any, Any]:
    """Return Re κ and Im κ of κ = (1 − β)/(1 − βᵗ); its denominator is at least 1 − |β|ᵗ > 0 in size."""
    if not s:
        return (1 - c) / (1 - c**step), 0.0
    cos, sin = (torch.cos, torch.sin) if isinstance(step, Tensor) else (math.cos, math.sin)
    power = momentum**step
    real, imag = 1 - power * cos(phase * step), -power * sin(phase * step)
    square = real * real + imag * imag
    return ((1 - c) * real - s * imag) / square, -(s * real + (1 - c) * imag) / square
