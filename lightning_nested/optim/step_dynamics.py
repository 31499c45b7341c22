"""How a player's optimizer turns gradients into steps, near where it is: momentum, and a diagonal in front."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_nested.linalg.vectors import Vector
from lightning_nested.optim import (
    ComplexAdam,
    ComplexSGD,
    Extragradient,
    ExtrapolationFromThePast,
    OptimisticAdam,
    OptimisticSGD,
)

Kind = Literal["momentum", "extragradient", "optimistic", "unknown"]


@dataclass(frozen=True)
class Momentum:
    """What follows from a step's gradient besides the scale.

    Attributes:
        kind: ``"momentum"``: μ ← βμ − g, w ← w + D·Re μ; ``"extragradient"`` and ``"optimistic"``: those updates;
            ``"unknown"``: none of them, so no rate can be predicted.
        momentum: |β|.
        phase: arg β.
    """

    kind: Kind
    momentum: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class StepDynamics:
    """One player's w ← w − D·(momentum of g), with D a positive diagonal.

    Attributes:
        scale: D for each parameter tensor, of its shape: the learning rate, times 1/(√v̂+ε) where the optimizer
            has second moments v̂.
        momenta: Of each parameter tensor.
        sign: −1 where the optimizer ascends (``maximize=True``): g is then the gradient of −L.
    """

    scale: Vector
    momenta: tuple[Momentum, ...]
    sign: int = 1

    @property
    def momentum(self) -> Momentum | None:
        """Of all parameters; None where groups differ."""
        return self.momenta[0] if len(set(self.momenta)) == 1 else None


def step_dynamics(optimizer: Optimizer, parameters: Sequence[Tensor]) -> StepDynamics:
    """What the optimizer would do with the next gradient.

    Second moments are taken as they are, as if they stood still: v̂ moves slowly against w. Weight decay is left out.
    An optimizer that is not known here has D = lr and no prediction.

    Args:
        optimizer: Of ``torch.optim`` or of this package.
        parameters: Those asked for, all of them in its groups.

    Raises:
        ValueError: Some of the parameters ascend and others descend.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> found = step_dynamics(ComplexSGD([w], lr=0.5, momentum=0.8, phase=0.5), [w])
        >>> found.scale, found.momentum, found.sign
        ((tensor([0.5000, 0.5000]),), Momentum(kind='momentum', momentum=0.8, phase=0.5), 1)
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = [_of_parameter(optimizer, groups[id(p)], optimizer.state.get(p, {})) for p in parameters]
    signs = {-1 if groups[id(p)].get("maximize", False) else 1 for p in parameters}
    if len(signs) > 1:
        raise ValueError(
            "All parameter groups of a player must have the same maximize, or it has no loss of its own to descend. "
            "Got True and False; make two players of them."
        )
    return StepDynamics(
        scale=tuple(
            torch.as_tensor(scale, dtype=p.dtype, device=p.device).expand_as(p)
            for (scale, _), p in zip(found, parameters, strict=True)
        ),
        momenta=tuple(momentum for _, momentum in found),
        sign=signs.pop() if signs else 1,
    )


def _of_parameter(
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[Tensor | float, Momentum]:
    lr = float(group["lr"])
    for kind, describe in _KNOWN:
        if isinstance(optimizer, kind):
            factor, momentum = describe(group, state)
            return _over_root(lr * factor, group, state), momentum
    return lr, Momentum("unknown")


def _over_root(rate: float, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor | float:
    """The rate, divided by √v̂ + ε if there are second moments."""
    if "exp_avg_sq" not in state:
        return rate
    step = float(state["step"])
    v = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    root = (v.detach() / (1 - float(group["betas"][1]) ** step)).sqrt()
    quotient: Tensor = rate / (root + float(group["eps"]))
    return quotient


def _sgd(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, Momentum]:
    kind: Kind = "unknown" if group["nesterov"] else "momentum"
    return 1.0 - float(group["dampening"]) * (group["momentum"] != 0), Momentum(
        kind, float(group["momentum"])
    )


def _adam(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, Momentum]:
    beta = float(group["betas"][0])
    return (1 - beta) / (1 - beta ** float(state.get("step", math.inf))), Momentum("momentum", beta)


def _complex_sgd(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, Momentum]:
    return 1.0, Momentum("momentum", float(group["momentum"]), float(group["phase"]))


def _complex_adam(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, Momentum]:
    momentum = Momentum("momentum", float(group["betas"][0]), float(group["phase"]))
    if not group["debias"]:
        return 1.0, momentum
    if group["phase"] == 0:
        return _adam(group, state)
    return 1.0, Momentum("unknown")  # the factor 1 − β is complex: another polynomial


def _optimistic_adam(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, Momentum]:
    return 1.0, Momentum("optimistic" if group["betas"][0] == 0 else "unknown")


def _always(kind: Kind) -> Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[float, Momentum]]:
    return lambda group, state: (1.0, Momentum(kind))


_KNOWN: tuple[
    tuple[type[Optimizer], Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[float, Momentum]]], ...
] = (
    (ComplexSGD, _complex_sgd),
    (ComplexAdam, _complex_adam),
    (Extragradient, _always("extragradient")),
    (ExtrapolationFromThePast, _always("optimistic")),
    (OptimisticSGD, _always("optimistic")),
    (OptimisticAdam, _optimistic_adam),
    (SGD, _sgd),
    (Adam, _adam),  # AdamW too
)


def has_complex_momentum(optimizer: Optimizer) -> bool:
    """Whether |β| and arg β can be set, and the rest of a step stays as it is."""
    if isinstance(optimizer, ComplexAdam):  # with debias a step's size hangs on β
        return not any(group["debias"] for group in optimizer.param_groups)
    return isinstance(optimizer, ComplexSGD)


def set_momentum(optimizer: Optimizer, momentum: float, phase: float) -> None:
    """Set |β| and arg β of all groups of a :class:`ComplexSGD` or :class:`ComplexAdam`."""
    for group in optimizer.param_groups:
        if isinstance(optimizer, ComplexSGD):
            group["momentum"] = momentum
        else:
            group["betas"] = (momentum, group["betas"][1])
        group["phase"] = phase


_DECOUPLED = (torch.optim.AdamW, torch.optim.Adafactor)


def coupled_decay(optimizer: Optimizer) -> list[float]:
    """The inner optimizer's own L2 penalty of each parameter, where it is part of the gradient.

    So it is in every optimizer of ``torch.optim`` and of this package but those that say otherwise. Of other
    classes it is not known; they are taken to be decoupled, with a warning.
    """
    home = type(optimizer).__module__.split(".")[:2]
    known = home in (["torch", "optim"], ["lightning_nested", "optim"])
    if not known and any(group.get("weight_decay") for group in optimizer.param_groups):
        warnings.warn(
            f"Whether the weight_decay of {type(optimizer).__name__} is part of the gradient is not known; the "
            "hypergradient leaves it out. Set it to 0 and tune WeightDecay() instead.",
            stacklevel=2,
        )
    return [
        float(group.get("weight_decay", 0.0))
        if known
        and not isinstance(optimizer, _DECOUPLED)
        and type(optimizer).__name__ != "Muon"
        and not group.get("decoupled_weight_decay", False)
        else 0.0
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    ]


def trainable(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer moves, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
