"""The default outer optimizer of a decay per weight: one step for all of a tensor, and deviations as far as they last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from typing_extensions import override

from lightning_nested.hyperparameters.weight_decay import WeightDecay

# Gradients that a momentum of 0.9 averages: no more batches than these count as evidence.
_AVERAGED = 20


class SharedAdam(Adam):
    """Adam on the sum of each tensor's gradient, and on the deviations from their mean, by a share of its step.

    With g the gradient of a tensor of n entries and A(·) a step of Adam, λ ← λ − A(Σg)·1 − s·(A(d) − mean A(d)),
    d = g − mean(g). With s = 0 this is Adam on one value for the tensor. The share s is 1 − ``shrink`` if the group of
    parameters has that number. Otherwise (None) it is the part of d's average over the outer data that is not noise: with
    ρ the correlation of the d of two successive outer batches, which are of other examples, and b batches in a
    round, s = ρ/(ρ + (1 − ρ)/min(b, 20)), as in shrinkage by empirical Bayes. Shuffled rounds meet examples again,
    which makes noise agree: ρ is lowered by (1 − ρ)/b². One batch a round (b = 1) tells nothing of noise: s = 0.

    Groups without the key ``shrink`` are plain Adam.

    Args:
        groups: Groups of parameters, see :class:`torch.optim.Optimizer`.
        batches: Outer batches in a round over their data; None: unknown, so that no batch comes twice.
        options: Arguments of :class:`torch.optim.Adam`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, batches: int | None = None, **options: Any) -> None:
        super().__init__(groups, **options)
        for group in self.param_groups:
            group["batches"] = batches

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; the gradients of shared groups are used up."""
        for group in self.param_groups:
            for parameter in group["params"] if "shrink" in group else ():
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
                    # Adam leaves out parameters without a gradient.
                    parameter.grad = None
        return super().step(closure)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Move one tensor."""
        state = self.state[parameter]
        if not state:
            zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            state["step"] = torch.zeros((), dtype=torch.float32)
            state |= {key: zero.clone() for key in ("sum", "sum_sq", "agreement", "size")}
            state |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq", "previous")}
        state["step"] += 1
        rate, steps = float(group["lr"]), float(state["step"])
        deviation = gradient - gradient.mean()
        parameter -= rate * _direction(state, ("sum", "sum_sq"), gradient.sum(), group, steps)
        move = _direction(state, ("exp_avg", "exp_avg_sq"), deviation, group, steps)
        share = self._share(state, deviation, group)
        parameter -= rate * share * (move - move.mean())

    def _share(self, state: dict[str, Any], deviation: Tensor, group: dict[str, Any]) -> Tensor | float:
        """Return s, after this deviation has been compared with the one before."""
        previous, beta = state["previous"], group["betas"][0]
        state["agreement"].mul_(beta).add_((previous * deviation).sum())
        state["size"].mul_(beta).add_(previous.norm() * deviation.norm())
        previous.copy_(deviation)
        if group["shrink"] is not None:
            return 1.0 - float(group["shrink"])
        batches = group["batches"]
        if batches == 1:
            return 0.0
        size: Tensor = state["size"]
        correlation = state["agreement"] / size.clamp_min(torch.finfo(size.dtype).tiny)
        if batches is not None:
            correlation = correlation - (1 - correlation) / batches**2
        correlation = correlation.clamp(0, 1)
        return correlation / (correlation + (1 - correlation) / min(batches or _AVERAGED, _AVERAGED))


def _direction(
    state: dict[str, Any], keys: tuple[str, str], gradient: Tensor, group: dict[str, Any], steps: float
) -> Tensor:
    """Return Adam's step of rate one along a gradient, whose running means have these keys."""
    (first, second), (mean, square) = group["betas"], (state[key] for key in keys)
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root: Tensor = (square / (1 - second**steps)).sqrt_().add_(group["eps"])
    return mean / (1 - first**steps) / root


def default_adam(
    decays: Sequence[WeightDecay], tensors: Iterable[Tensor], *, batches: int | None = None, **options: Any
) -> Optimizer:
    """Return Adam, :class:`SharedAdam` where a decay has one value per weight.

    Args:
        decays: The tuned decays.
        tensors: All tuned tensors.
        batches: See :class:`SharedAdam`.
        options: Arguments of Adam.
    """
    each, tensors = [d for d in decays if d.per == "parameter"], list(tensors)
    if not each:
        return Adam(tensors, **options)
    own = {id(t) for d in each for t in d.tensors.values()}
    groups: list[dict[str, Any]] = [{"params": [t for t in tensors if id(t) not in own]}]
    held = {id(t) for t in tensors}
    for decay in each:
        shared = [t for t in decay.tensors.values() if id(t) in held]
        groups.append({"params": shared, "shrink": decay.shrink})
    return SharedAdam([g for g in groups if g["params"]], batches=batches, **options)
