"""How an optimizer turns gradients into steps, near where it is: momentum, and a diagonal in front."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_nested.linalg.vectors import Vector
from lightning_nested.optim.long_run import long_run_divisor
from lightning_nested.optim.registry import KNOWN, Description, find_rule
from lightning_nested.optim.update_rules import AdaptiveRule, Descent, Momentum


@dataclass(frozen=True, kw_only=True, eq=False)
class StepDynamics:
    """One player's w ← w − D·(momentum of g), with D a positive diagonal.

    Attributes:
        scale: D for each parameter tensor, of its shape: the learning rate, times 1/(√v̂+ε) where the optimizer
            has second moments v̂.
        momenta: Momentum of each parameter tensor.
        sign: −1 where the optimizer ascends (``maximize=True``): g is then the gradient of −L.
    """

    scale: Vector
    momenta: tuple[Momentum, ...]
    sign: int = 1

    @property
    def momentum(self) -> Momentum | None:
        """The momentum of all parameters; None where groups differ."""
        return self.momenta[0] if len(set(self.momenta)) == 1 else None


def step_dynamics(optimizer: Optimizer, parameters: Sequence[Tensor]) -> StepDynamics:
    """Return what the optimizer would do with the next gradient.

    Second moments are taken as they are, as if they stood still: v̂ moves slowly against w. Weight decay is left out.
    An optimizer that is not known (``lightning_nested.optim.registry``) has D = lr and no prediction.

    Args:
        optimizer: The optimizer, in its current state.
        parameters: Some of the parameters in its groups.

    Raises:
        ValueError: Some of the parameters ascend and others descend.

    Example:
        >>> from lightning_nested.optim import ComplexSGD
        >>> w = torch.zeros(2, requires_grad=True)
        >>> found = step_dynamics(ComplexSGD([w], lr=0.5, momentum=0.8, phase=0.5), [w])
        >>> found.scale, found.momentum, found.sign
        ((tensor([0.5000, 0.5000]),), Momentum(kind='momentum', momentum=0.8, phase=0.5), 1)
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    signs = {-1 if groups[id(p)].get("maximize", False) else 1 for p in parameters}
    if len(signs) > 1:
        raise ValueError(
            "All parameter groups of a player must have the same maximize, or it has no loss of its own to descend. "
            "Got True and False; make two players of them."
        )
    scales, momenta, rules = [], [], _rules(optimizer)
    for p in parameters:
        group, rule = groups[id(p)], rules[id(p)]
        scale = float(group["lr"]) if rule is None else rule.scale(optimizer.state.get(p, {}))
        scales.append(torch.as_tensor(scale, dtype=p.dtype, device=p.device).expand_as(p))
        momenta.append(Momentum("unknown") if rule is None else rule.momentum_kind())
    return StepDynamics(scale=tuple(scales), momenta=tuple(momenta), sign=signs.pop() if signs else 1)


def _rules(optimizer: Optimizer) -> dict[int, Descent | None]:
    """Return the rule of each parameter's group, by ``id``."""
    rules = [(find_rule(optimizer, group), group["params"]) for group in optimizer.param_groups]
    return {id(p): rule for rule, parameters in rules for p in parameters}


def inverse_rates(optimizer: Optimizer, parameters: Sequence[Tensor], ahead: float = 0.0) -> Vector:
    """Return 1/R of each parameter: the gradient that moves it by one unit in a step, once momentum has built up.

    R = D·Re 1/(1 − β) with D and β of :func:`step_dynamics`: α/(1 − β) for SGD, α/(√v̂ + ε) for Adam; that of
    :func:`long_run_divisor` for torch's other adaptive optimizers, averaged over ``ahead`` steps; α for all others.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rules, found = _rules(optimizer), []
    for p in parameters:
        rule, state, group = rules[id(p)], optimizer.state.get(p, {}), groups[id(p)]
        momentum = Momentum("unknown") if rule is None else rule.momentum_kind()
        beta = momentum.momentum * complex(math.cos(momentum.phase), math.sin(momentum.phase))
        gain = max((1 / (1 - beta)).real if abs(beta) < 1 else 1.0, 1e-3)
        # Infinite where the learning rate is zero.
        largest = 1e-3 / torch.finfo(p.dtype).tiny
        divisor = long_run_divisor(optimizer, group, state, ahead) if rule is None else None
        rate = gain * float(group["lr"])
        if isinstance(rule, AdaptiveRule) and rule.second in state:
            # Of an old average: a young one weighs its newest gradient more.
            divisor, rate = rule.divisor(state), rate * rule.gain(math.inf)
        elif rule is not None:
            rate = gain * float(rule.scale(state))
        rate = max(rate, 1 / largest)
        if divisor is None:
            inverse = torch.full_like(p, 1 / rate, requires_grad=False)
        else:
            inverse = divisor.to(p.dtype).div_(rate).clamp_max_(largest)
        found.append(inverse)
    return tuple(found)


def has_long_run(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> bool:
    """Return True if :func:`inverse_rates` knows R of a parameter in this group, from its steps so far if need be."""
    rule, state = find_rule(optimizer, group), optimizer.state.get(parameter, {})
    if rule is None:
        return long_run_divisor(optimizer, group, state) is not None
    return not isinstance(rule, AdaptiveRule) or rule.second in state


def decoupled_rates(optimizer: Optimizer) -> dict[int, float]:
    """Return by ``id`` the rate by which a decoupled decay λ shrinks a parameter, w ← (1 − rate·λ)w; empty if coupled.

    Such a decay acts like a coupled one of λ·rate/R, see :func:`inverse_rates`.
    """
    known = KNOWN.get(type(optimizer)) or Description(coupled=True)
    return {
        id(p): float(group["lr"])
        for group in optimizer.param_groups
        if not known.has_coupled_decay(group)
        for p in group["params"]
    }


def decay_factors(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return by name the factor rate/R that makes an equal coupled decay of a decoupled one; empty if it is coupled.

    Where the training stands still, R·g + rate·λ·w = 0, as with a coupled decay of λ·rate/R: λ(√v̂ + ε) for AdamW.
    """
    rates = decoupled_rates(optimizer)
    if not rates:
        return {}
    inverse = inverse_rates(optimizer, tuple(parameters.values()))
    pairs = zip(parameters.items(), inverse, strict=True)
    return {name: rates[id(p)] * r for (name, p), r in pairs if id(p) in rates}


def has_complex_momentum(optimizer: Optimizer) -> bool:
    """Return True if |β| and arg β can be set, and the rest of a step stays as it is."""
    rules = [find_rule(optimizer, group) for group in optimizer.param_groups]
    # with debias a step's size depends on β
    return all(hasattr(rule, "phase") and not getattr(rule, "debias", False) for rule in rules)


def set_momentum(optimizer: Optimizer, momentum: float, phase: float) -> None:
    """Set |β| and arg β of all groups of a :class:`ComplexSGD` or :class:`ComplexAdam`."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum
        group["phase"] = phase


def coupled_decay(optimizer: Optimizer) -> list[float]:
    """Return the optimizer's own L2 penalty of each parameter, 0 where the decay is not part of the gradient.

    An optimizer that is not known is taken to be decoupled, with a warning.
    """
    known = KNOWN.get(type(optimizer))
    if known is None and any(group.get("weight_decay") for group in optimizer.param_groups):
        warnings.warn(
            f"Whether the weight_decay of {type(optimizer).__name__} is part of the gradient is not known; the "
            "hypergradient leaves it out. Set it to 0 and tune WeightDecay() instead.",
            stacklevel=2,
        )
    known = known or Description(coupled=False)
    return [
        float(group.get("weight_decay", 0.0)) if known.has_coupled_decay(group) else 0.0
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    ]


def trainable(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimizer moves, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def shaped(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimizer moves, without those of lazy layers that no batch has reached."""
    return [p for p in trainable(optimizer) if not is_lazy(p)]
