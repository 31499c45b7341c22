"""All that is known of an optimizer: its update, its momentum and scale, and what its weight decay is.

To make an optimizer known, write its rule here and enter its class into ``KNOWN``. The exact map of a step, Lyapunov
exponents, predicted rates, unrolled hypergradients and the treatment of weight decay follow from that entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from lightning_nested.linalg.vectors import Vector
from lightning_nested.optim.complex_adam import ComplexAdam, correction
from lightning_nested.optim.complex_sgd import ComplexSGD
from lightning_nested.optim.extragradient import Extragradient, ExtrapolationFromThePast
from lightning_nested.optim.nupi import NuPI
from lightning_nested.optim.optimistic import OptimisticAdam, OptimisticSGD
from lightning_nested.optim.options import coefficient
from lightning_nested.optim.update_rules import AdaptiveRule, Descent, Kind, LinearRule, Momentum, UpdateRule


@dataclass(frozen=True, kw_only=True)
class SGDRule(LinearRule):
    """``torch.optim.SGD``: b ← μb + (1−τ)e, w ← w − α(b, or e + μb with Nesterov)."""

    momentum: float = 0.0  # μ
    dampening: float = 0.0  # τ
    nesterov: bool = False
    slots: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def start(self, w: Tensor) -> Vector:
        """Return no buffer without momentum."""
        return super().start(w) if self.momentum else ()

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Take the step; torch takes the first gradient without dampening."""
        e = self.ascent(w, g)
        if not self.momentum:
            return w - self.lr * e, ()
        share = 1 - self.dampening * (t > 1).to(w.dtype) if self.dampening else 1.0
        b = self.momentum * slots[0] + share * e
        return w - self.lr * (e + self.momentum * b if self.nesterov else b), (b,)

    def momentum_kind(self) -> Momentum:
        """Return μ; with Nesterov's look ahead there is no β that does the same."""
        return Momentum("unknown" if self.nesterov else "momentum", self.momentum)

    def scale(self, state: Mapping[str, Any]) -> float:
        """Return α(1 − τ)."""
        return self.lr * (1 - self.dampening * (self.momentum != 0))


@dataclass(frozen=True, kw_only=True)
class ComplexSGDRule(LinearRule):
    """:class:`ComplexSGD`: m ← βm + e with β = momentum·e^{i·phase}, w ← w − α Re m."""

    momentum: float
    phase: float
    slots: ClassVar[tuple[str, ...]] = ComplexSGD.slots

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Take the step; the buffers are real and imaginary part."""
        a, b = _turned(self.momentum, self.phase, slots)
        a = a + self.ascent(w, g)
        return w - self.lr * a, (a, b)

    def momentum_kind(self) -> Momentum:
        """Return β."""
        return Momentum("momentum", self.momentum, self.phase)


@dataclass(frozen=True, kw_only=True)
class ExtragradientRule(LinearRule):
    """:class:`Extragradient`: w′ ← w − α e(w), w ← w − α e(w′). The map asks for the second gradient."""

    num_gradients: ClassVar[int] = Extragradient.num_gradients
    kind: ClassVar[Kind] = "extragradient"

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Take either half, from w with the gradient e taken where the decay's gradient belongs."""
        return w - self.lr * g, ()


@dataclass(frozen=True, kw_only=True)
class PastRule(LinearRule):
    """:class:`ExtrapolationFromThePast`: anchor ← anchor − α e(w′), w′ ← anchor − α e(w′)."""

    slots: ClassVar[tuple[str, ...]] = ExtrapolationFromThePast.slots
    kind: ClassVar[Kind] = "optimistic"

    def start(self, w: Tensor) -> Vector:
        """Return the parameter as its anchor."""
        return (w.clone(),)

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Take both halves."""
        e = self.lr * self.ascent(w, g)
        anchor = slots[0] - e
        return anchor - e, (anchor,)


@dataclass(frozen=True, kw_only=True)
class OptimisticSGDRule(LinearRule):
    """:class:`OptimisticSGD`: w ← w − α(2eₜ − eₜ₋₁)."""

    slots: ClassVar[tuple[str, ...]] = OptimisticSGD.slots
    kind: ClassVar[Kind] = "optimistic"

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Take the step; the buffer is the gradient before."""
        e = self.ascent(w, g)
        return w - self.lr * (2 * e - slots[0]), (e,)


@dataclass(frozen=True, kw_only=True)
class NuPIRule(LinearRule):
    """:class:`NuPI`: ξ ← νξ + (1−ν)e, w ← w − α(e + κ times the change of ξ)."""

    proportional: float  # κ
    nu: float = 0.0  # ν
    slots: ClassVar[tuple[str, ...]] = NuPI.slots

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Take the step; the buffer is ξ."""
        e = self.ascent(w, g)
        change = (1 - self.nu) * (e - slots[0])
        return w - self.lr * (e + self.proportional * change), (slots[0] + change,)

    def momentum_kind(self) -> Momentum:
        """Return the kind of the two that have a name: no memory, and the optimistic step."""
        if not self.proportional:
            return Momentum("momentum")
        return Momentum("optimistic" if self.proportional == 1 and not self.nu else "unknown")


@dataclass(frozen=True, kw_only=True)
class AdamRule(AdaptiveRule):
    """``torch.optim.Adam``, and ``AdamW`` with a decoupled decay w ← (1 − αλ)w."""

    decoupled: bool = False

    def ascent(self, w: Tensor, g: Tensor) -> Tensor:
        """Return e; a decoupled decay is no part of it."""
        if self.decoupled:
            return -g if self.maximize else g
        return super().ascent(w, g)

    def moments(self, e: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Return m̂ and m."""
        m = self.beta1 * slots[0] + (1 - self.beta1) * e
        return m / (1 - self.beta1**t), (m,)

    def move(self, w: Tensor, d: Tensor, slots: Vector, after: Vector) -> tuple[Tensor, Vector]:
        """Return (1 − αλ)w − αd where the decay is decoupled."""
        return super().move(w * (1 - self.lr * self.weight_decay) if self.decoupled else w, d, slots, after)

    def momentum_kind(self) -> Momentum:
        """Return β₁."""
        return Momentum("momentum", self.beta1)


@dataclass(frozen=True, kw_only=True)
class AMSGradRule(AdamRule):
    """``torch.optim.Adam(amsgrad=True)``: the largest v so far divides. Its derivative is by ``torch.func``."""

    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    second: ClassVar[str] = "max_exp_avg_sq"
    tangent = Descent.tangent

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Take the step."""
        e = self.ascent(w, g)
        p, moments = self.moments(e, slots, t)
        v = self._square(slots, e)
        largest = torch.maximum(slots[2], v)
        return self.move(w, p / (self._root(largest, t) + self.eps), slots, (*moments, v, largest))


@dataclass(frozen=True, kw_only=True)
class OptimisticAdamRule(AdamRule):
    """:class:`OptimisticAdam`: w ← w − α(2dₜ − dₜ₋₁) with Adam's direction d."""

    slots: ClassVar[tuple[str, ...]] = OptimisticAdam.slots[1:]

    def move(self, w: Tensor, d: Tensor, slots: Vector, after: Vector) -> tuple[Tensor, Vector]:
        """Keep d as the third buffer."""
        return w - self.lr * (2 * d - slots[2]), (*after, d)

    def gain(self, t: float) -> float:
        """Return 1, as for the only β₁ that is predicted, 0."""
        return 1.0

    def momentum_kind(self) -> Momentum:
        """Return the kind; with β₁ there are two memories."""
        return Momentum("unknown" if self.beta1 else "optimistic")


@dataclass(frozen=True, kw_only=True)
class ComplexAdamRule(AdaptiveRule):
    """:class:`ComplexAdam`: m ← β₁m + e, w ← w − α Re(κm)/(√v̂ + ε), κ = 1, or (1−β₁)/(1−β₁ᵗ) with debias."""

    phase: float
    debias: bool = False
    slots: ClassVar[tuple[str, ...]] = ComplexAdam.slots[1:]

    def moments(self, e: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Return Re(κm), and m as real and imaginary part."""
        a, b = _turned(self.beta1, self.phase, slots)
        a = a + e
        if not self.debias:
            return a, (a, b)
        real, imag = correction(*coefficient(self.beta1, self.phase), self.beta1, self.phase, t)
        return real * a - imag * b, (a, b)

    def gain(self, t: float) -> float:
        """Return κ where it is real."""
        return super().gain(t) if self.debias and not self.phase else 1.0

    def momentum_kind(self) -> Momentum:
        """Return β₁; a complex κ makes another polynomial."""
        known = not (self.debias and self.phase)
        return Momentum("momentum", self.beta1, self.phase) if known else Momentum("unknown")


def _turned(momentum: float, phase: float, slots: Vector) -> tuple[Tensor, Tensor]:
    """βm, as real and imaginary part."""
    c, s = coefficient(momentum, phase)
    return c * slots[0] - s * slots[1], s * slots[0] + c * slots[1]


@dataclass(frozen=True)
class Description:
    """Knowledge of one class of optimizers.

    Attributes:
        rule: Its update, momentum and scale; None: only its decay is known.
        coupled: True if its weight decay is part of the gradient; False if it shrinks the weights beside the step.
    """

    rule: type[Descent] | None = None
    coupled: bool = True

    def has_coupled_decay(self, group: Mapping[str, Any]) -> bool:
        """Return True if the group's weight decay is part of the gradient."""
        return self.coupled and not group.get("decoupled_weight_decay", False)

    def rule_of(self, group: Mapping[str, Any]) -> Descent | None:
        """Return the rule with the options of a parameter group."""
        if self.rule is None:
            return None
        options = dict(group, decoupled=not self.has_coupled_decay(group))
        if "betas" in group:
            options["beta1"], options["beta2"] = group["betas"]
        kind = AMSGradRule if group.get("amsgrad", False) else self.rule
        given = ((field.name, options[field.name]) for field in fields(kind) if field.name in options)
        values: dict[str, Any] = {name: x if isinstance(x, bool) else float(x) for name, x in given}
        return kind(**values)


KNOWN: dict[type[Optimizer], Description] = {
    optim.SGD: Description(SGDRule),
    optim.Adam: Description(AdamRule),
    optim.AdamW: Description(AdamRule, coupled=False),
    ComplexSGD: Description(ComplexSGDRule),
    ComplexAdam: Description(ComplexAdamRule),
    Extragradient: Description(ExtragradientRule),
    ExtrapolationFromThePast: Description(PastRule),
    NuPI: Description(NuPIRule),
    OptimisticSGD: Description(OptimisticSGDRule),
    OptimisticAdam: Description(OptimisticAdamRule),
    **dict.fromkeys((optim.Adadelta, optim.Adagrad, optim.Adamax, optim.ASGD, optim.LBFGS), Description()),
    **dict.fromkeys((optim.NAdam, optim.RAdam, optim.RMSprop, optim.Rprop, optim.SparseAdam), Description()),
    optim.Adafactor: Description(coupled=False),
}
if hasattr(optim, "Muon"):  # since torch 2.9
    KNOWN[optim.Muon] = Description(coupled=False)


def find_rule(optimizer: Optimizer, group: Mapping[str, Any]) -> Descent | None:
    """Return the rule of a known optimizer, or of the known one it derives from; None: neither."""
    found = next((KNOWN[kind] for kind in type(optimizer).__mro__ if kind in KNOWN), Description())
    return found.rule_of(group)


def known_rule(optimizer: Optimizer, group: Mapping[str, Any]) -> UpdateRule:
    """Return the differentiable rule of a parameter group's optimizer with the group's options.

    Raises:
        ValueError: The optimizer is not known, or has ``amsgrad``.
    """
    if group.get("amsgrad", False):
        raise ValueError(
            "update_map knows Adam without amsgrad. Got amsgrad=True; pass rule= with a re-statement."
        )
    rule = KNOWN.get(type(optimizer), Description()).rule_of(group)
    if rule is None:
        *names, last = (kind.__name__ for kind, known in KNOWN.items() if known.rule is not None)
        raise ValueError(
            f"update_map knows {', '.join(names)} and {last}. Got {type(optimizer).__name__}; pass rule= with a "
            "re-statement of its step: a subclass of lightning_nested.dynamics.UpdateRule."
        )
    return rule
