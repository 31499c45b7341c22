"""Divisors of torch's adaptive optimizers in the long run, for those whose step has no rule in the registry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import Optimizer


def _of_adam(group: Mapping[str, Any], state: Mapping[str, Any], ahead: float) -> Tensor:
    """Return √v̂ + ε; RAdam's rectification and NAdam's changing momentum are 1 and β₁ in the long run."""
    share = 1 - float(group["betas"][1]) ** float(state["step"])
    second: Tensor = state["exp_avg_sq"]
    return second.div(share).sqrt_().add_(group["eps"])


def _of_adamax(group: Mapping[str, Any], state: Mapping[str, Any], ahead: float) -> Tensor:
    """Return the largest gradient, which holds ε."""
    largest: Tensor = state["exp_inf"]
    return largest.clone()


def _of_rmsprop(group: Mapping[str, Any], state: Mapping[str, Any], ahead: float) -> Tensor:
    """Return (1 − μ)(√v̂ + ε); the step itself divides by √v, which is too small at first."""
    second: Tensor = state["square_avg"]
    if group["centered"]:
        mean = state["grad_avg"]
        # Of gradients that are all the same rounding leaves less than zero.
        second = second.addcmul(mean, mean, value=-1).clamp_min_(0.0)
    share = 1 - float(group["alpha"]) ** float(state["step"])
    return second.div(share).sqrt_().add_(group["eps"]).mul_(1 - float(group["momentum"]))


def _of_adagrad(group: Mapping[str, Any], state: Mapping[str, Any], ahead: float) -> Tensor:
    """Return √Σg² + ε over the mean of √(t/s) for the coming steps s: the sum grows with their number."""
    t = float(state["step"])
    share = 2 * math.sqrt(t) / (math.sqrt(t + ahead) + math.sqrt(t))
    total: Tensor = state["sum"]
    return total.sqrt().add_(group["eps"]).mul_((1 + t * float(group["lr_decay"])) / share)


_DIVISORS: dict[type[Optimizer], Callable[[Mapping[str, Any], Mapping[str, Any], float], Tensor]] = {
    optim.NAdam: _of_adam,
    optim.RAdam: _of_adam,
    optim.Adamax: _of_adamax,
    optim.RMSprop: _of_rmsprop,
    optim.Adagrad: _of_adagrad,
}


@torch.no_grad()
def long_run_divisor(
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], ahead: float = 0.0
) -> Tensor | None:
    """Return lr/R of one parameter, a new tensor of its shape; None before its first step, or if it is not known.

    R is what a constant unit of gradient would move the parameter by in a step, with second moments as they are. Known
    are NAdam, RAdam, Adamax, RMSprop, Adagrad, and what derives from them.

    Args:
        optimizer: The optimizer.
        group: The parameter's group.
        state: Its state.
        ahead: Coming steps over which R is averaged, where it falls with their number (Adagrad).
    """
    found = next((_DIVISORS[kind] for kind in type(optimizer).__mro__ if kind in _DIVISORS), None)
    # Adagrad has buffers from the start.
    if found is None or not float(state.get("step", 0.0)) > 0:
        return None
    return found(group, state, ahead)
