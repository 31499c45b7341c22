"""How a player's optimizer turns gradients into steps, near where it is: momentum, and a diagonal in front."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from lightning_nested.games.jacobian import JacobianOperator
from lightning_nested.hypergradient.curvature import LinearOperator
from lightning_nested.hypergradient.vectors import Vector, flatten
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


class StepJacobian(LinearOperator):
    """(DJ)ᵀ of a game whose players step by w ← w − D·(momentum of g): v ↦ Jᵀ(D v), with the eigenvalues of DJ.

    Args:
        jacobian: J of the joint gradient.
        scale: D for each tensor of ``jacobian.like``.
    """

    symmetric = False
    like: Vector

    def __init__(self, jacobian: JacobianOperator, scale: Vector) -> None:
        self.jacobian, self.scale, self.like = jacobian, scale, jacobian.like
        self._dense: Tensor | None = None

    def matvec(self, v: Vector) -> Vector:
        """Jᵀ(D v)."""
        return self.jacobian.rmatvec(tuple(a * d for a, d in zip(v, self.scale, strict=True)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers that each player holds."""
        return tuple(
            sum(p.numel() for p in self.jacobian.tensors_of(i)) for i in range(self.jacobian.num_players)
        )

    def dense(self) -> Tensor:
        """√D J √D of shape (n, n): similar to DJ, and no player's eigenvectors are larger only by its scale.

        Raises:
            FloatingPointError: An entry is not finite.
        """
        if self._dense is None:  # n products, so once
            root = flatten(self.scale).sqrt()
            found = root[:, None] * self.jacobian.dense() * root
            if not bool(torch.isfinite(found).all()):
                raise FloatingPointError(
                    "The Jacobian must be finite. Got an entry that is not: second derivatives overflowed."
                )
            self._dense = found
        return self._dense


class OwnStepJacobian(LinearOperator):
    """√D H √D of one player, which is symmetric and has the eigenvalues of D H, with H = ∂²L_i/∂w_i².

    Args:
        hessian: H.
        scale: D for each tensor of ``hessian.like``.
    """

    def __init__(self, hessian: LinearOperator, scale: Vector) -> None:
        self.hessian, self.like = hessian, hessian.like
        self._roots = tuple(d.sqrt() for d in scale)

    def matvec(self, v: Vector) -> Vector:
        """√D(H(√D v))."""
        product = self.hessian.matvec(tuple(a * d for a, d in zip(v, self._roots, strict=True)))
        return tuple(a * d for a, d in zip(product, self._roots, strict=True))
