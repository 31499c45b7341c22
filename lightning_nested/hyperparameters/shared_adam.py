"""Default outer optimizer of a decay per weight: one step for the whole tensor, and deviations that data confirm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from typing_extensions import override

from lightning_nested.arguments import at_least, checked, fraction, within
from lightning_nested.hyperparameters.weight_decay import WeightDecay

# Gradients that a momentum of 0.9 averages: no more batches than these count as evidence.
_AVERAGED = 20
# Standard errors that the agreement of gradients must exceed.
_ERRORS = 2.0


@checked
class SharedAdam(Adam):
    """Adam on the sum of each tensor's gradient, and on the deviations from their mean, by a share of its step.

    With g the gradient of a tensor of n entries and A(·) a step of Adam, λ ← λ − A(Σg)·1 − s·(A(d) − mean A(d)),
    d = g − mean(g). With s = 0 this is Adam on one value for the tensor.

    The share s is 1 − ``shrink`` if the group of parameters has that number. Otherwise (None) it is full where at
    least half of d's average over a round of the outer data is signal: with ρ the correlation of the d of two
    successive outer batches, which are of other examples, and b batches in a round,
    s = min(1, 2ρ/(ρ + (1 − ρ)/min(b, 20))); without the 2 this is the factor of empirical Bayes. ρ is a running mean,
    lowered by two standard errors of independent entries, and by (1 − ρ)/b²: shuffled rounds meet examples again, whose
    noise agrees. One batch a round (b = 1) tells nothing of noise: s = 0.

    Args:
        params: Tensors, or groups as in :class:`torch.optim.Optimizer`; groups without ``shrink`` are plain Adam.
        lr: Learning rate.
        betas: Decays of the running means of gradients and of their squares; the first one also of ρ.
        eps: Number added to the root of the mean square; hypergradients may be of any size.
        shrink: Share by which deviations are shortened, for tensors without groups.
        batches: Outer batches in a round over their data; None: unknown, so that no batch comes twice. A callback or
            module of this package sets it.

    Raises:
        ValueError: A number is out of range, or there are no tensors.
    """

    batches: int | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.9),
        eps: float = 1e-16,
        shrink: float | None = None,
        batches: int | None = None,
    ) -> None:
        at_least(0, lr=lr, eps=eps)
        at_least(1, batches=batches)
        fraction(betas=betas)
        within(0, 1, shrink=shrink)
        groups: list[Any] = [params] if isinstance(params, Tensor) else list(params)
        if not groups:
            raise ValueError(
                "params must hold a tensor or a group. Got none; build the hyperparameters first."
            )
        if not all(isinstance(group, dict) for group in groups):
            groups = [{"params": groups, "shrink": shrink}]
        super().__init__(groups, lr=lr, betas=betas, eps=eps)
        # No option of a group: it is of the data at hand, not of a checkpoint.
        self.batches = batches

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
            state |= {key: zero.clone() for key in ("sum", "sum_sq", "agreement", "variance", "size")}
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
        products = previous * deviation
        state["agreement"].mul_(beta).add_(products.sum())
        state["variance"].mul_(beta**2).add_(products.square_().sum())
        state["size"].mul_(beta).add_(previous.norm() * deviation.norm())
        previous.copy_(deviation)
        if group["shrink"] is not None:
            return 1.0 - float(group["shrink"])
        batches = self.batches
        if batches == 1:
            return 0.0
        size: Tensor = state["size"]
        beyond_noise = state["agreement"] - _ERRORS * state["variance"].sqrt()
        correlation: Tensor = beyond_noise / size.clamp_min(torch.finfo(size.dtype).tiny)
        if batches is not None:
            correlation = correlation - (1 - correlation) / batches**2
        correlation = correlation.clamp(0, 1)
        noise = (1 - correlation) / min(batches or _AVERAGED, _AVERAGED)
        return (2 * correlation / (correlation + noise)).clamp(max=1)


def _direction(
    state: dict[str, Any], keys: tuple[str, str], gradient: Tensor, group: dict[str, Any], steps: float
) -> Tensor:
    """Return Adam's step of rate one along a gradient, whose running means have these keys."""
    (first, second), (mean, square) = group["betas"], (state[key] for key in keys)
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root: Tensor = (square / (1 - second**steps)).sqrt_().add_(group["eps"])
    step: Tensor = mean / (1 - first**steps) / root
    return step


def set_batches(optimizer: Optimizer, batches: int | None) -> None:
    """Say how many outer batches there are in a round, if this is a :class:`SharedAdam`; None: unknown."""
    if isinstance(optimizer, SharedAdam):
        optimizer.batches = batches


def refuse_shrink(decays: Sequence[WeightDecay]) -> None:
    """Refuse decays with a ``shrink`` that no outer optimizer would read.

    Raises:
        ValueError: It names the number.
    """
    for decay in decays:
        if decay.shrink is not None:
            raise ValueError(
                "shrink acts in the default outer optimizer of HypergradientCallback. Got "
                f"{decay.name} with shrink={decay.shrink}, and another outer optimizer or scheduler; leave out either, "
                "or give a function that returns SharedAdam(tensors, shrink=...)."
            )


def default_adam(decays: Sequence[WeightDecay], tensors: Iterable[Tensor], *, lr: float) -> Optimizer:
    """Return Adam for gradients of any size; :class:`SharedAdam` where there are decays per weight.

    Args:
        decays: The tuned decays.
        tensors: All tuned tensors.
        lr: Learning rate.
    """
    options: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.9), "eps": 1e-16}
    each, tensors = [d for d in decays if d.per == "parameter"], list(tensors)
    if not each:
        return Adam(tensors, **options)
    own = {id(t) for d in each for t in d.tensors.values()}
    groups: list[dict[str, Any]] = [{"params": [t for t in tensors if id(t) not in own]}]
    held = {id(t) for t in tensors}
    for decay in each:
        shared = [t for t in decay.tensors.values() if id(t) in held]
        groups.append({"params": shared, "shrink": decay.shrink})
    return SharedAdam([g for g in groups if g["params"]], **options)
