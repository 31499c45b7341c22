"""What optimizers do to one parameter and its buffers, as pure functions with closed-form derivatives.

A rule that is linear in (w, g, buffers) pushes tangents as it pushes values; the Adam family has one quotient to
differentiate. Either way a tangent costs one pass over the parameter beside its Hessian product.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.linalg.vectors import Vector
from lightning_nested.optim import (
    ComplexAdam,
    ComplexSGD,
    Extragradient,
    ExtrapolationFromThePast,
    OptimisticAdam,
    OptimisticSGD,
)


@dataclass(frozen=True, kw_only=True)
class UpdateRule(ABC):
    """One step of an optimizer on one parameter. Subclass it to re-state an optimizer of your own.

    ``step`` is all that must be written, in operations that ``torch.func`` differentiates; ``tangent`` then follows
    from it, and may be overridden with a closed form.
    """

    slots: ClassVar[tuple[str, ...]] = ()  # the buffers, by their names in ``optimizer.state``
    num_gradients: ClassVar[int] = 1

    def start(self, w: Tensor) -> Vector:
        """The buffers before the first step: zeros."""
        return tuple(torch.zeros_like(w) for _ in self.slots)

    @abstractmethod
    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """The next parameter and buffers.

        Args:
            w: Parameter.
            g: Its gradient.
            slots: Its buffers.
            t: Number of this step, from 1; a 0-dimensional floating-point tensor.
        """

    def tangent(
        self, w: Tensor, g: Tensor, slots: Vector, t: Tensor, dw: Tensor, dg: Tensor, dslots: Vector
    ) -> tuple[Tensor, Vector]:
        """Derivative of :meth:`step` along (dw, dg, dslots), in the shapes of (w, g, slots)."""

        def flat(w: Tensor, g: Tensor, *slots: Tensor) -> Vector:
            after, buffers = self.step(w, g, slots, t)
            return (after, *buffers)

        derivative: Vector = torch.func.jvp(flat, (w, g, *slots), (dw, dg, *dslots))[1]
        return derivative[0], derivative[1:]


@dataclass(frozen=True, kw_only=True)
class Descent(UpdateRule):
    """What all rules here share: rate, decay and direction.

    ``ascent`` is e = ±g + λw, the gradient as torch's optimizers use it.
    """

    lr: float  # α
    weight_decay: float = 0.0  # λ
    maximize: bool = False

    def ascent(self, w: Tensor, g: Tensor) -> Tensor:
        """±g + λw, linear in both, so tangents go through it as well."""
        signed = -g if self.maximize else g
        return signed + self.weight_decay * w if self.weight_decay else signed


class LinearRule(Descent):
    """A rule linear in (w, g, buffers): its derivative is itself."""

    def tangent(
        self, w: Tensor, g: Tensor, slots: Vector, t: Tensor, dw: Tensor, dg: Tensor, dslots: Vector
    ) -> tuple[Tensor, Vector]:
        """The same step on the tangents."""
        return self.step(dw, dg, dslots, t)


@dataclass(frozen=True, kw_only=True)
class SGDRule(LinearRule):
    """``torch.optim.SGD``: b ← μb + (1−τ)e, w ← w − α(b, or e + μb with Nesterov)."""

    momentum: float = 0.0  # μ
    dampening: float = 0.0  # τ
    nesterov: bool = False
    slots: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def start(self, w: Tensor) -> Vector:
        """No buffer without momentum."""
        return super().start(w) if self.momentum else ()

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """torch takes the first gradient without dampening."""
        e = self.ascent(w, g)
        if not self.momentum:
            return w - self.lr * e, ()
        share = 1 - self.dampening * (t > 1).to(w.dtype) if self.dampening else 1.0
        b = self.momentum * slots[0] + share * e
        return w - self.lr * (e + self.momentum * b if self.nesterov else b), (b,)


@dataclass(frozen=True, kw_only=True)
class ComplexSGDRule(LinearRule):
    """:class:`ComplexSGD`: m ← βm + e with β = momentum·e^{i·phase}, w ← w − α Re m."""

    momentum: float
    phase: float
    slots: ClassVar[tuple[str, ...]] = ("momentum_buffer", "momentum_buffer_imag")

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Real and imaginary part."""
        c, s = self.momentum * math.cos(self.phase), self.momentum * math.sin(self.phase)
        a, b = slots
        a, b = c * a - s * b + self.ascent(w, g), s * a + c * b
        return w - self.lr * a, (a, b)


@dataclass(frozen=True, kw_only=True)
class ExtragradientRule(LinearRule):
    """:class:`Extragradient`: w′ ← w − α e(w), w ← w − α e(w′). The map asks for the second gradient."""

    num_gradients: ClassVar[int] = 2

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Either half, from w with the gradient e taken where the decay's gradient belongs."""
        return w - self.lr * g, ()


@dataclass(frozen=True, kw_only=True)
class PastRule(LinearRule):
    """:class:`ExtrapolationFromThePast`: anchor ← anchor − α e(w′), w′ ← anchor − α e(w′)."""

    slots: ClassVar[tuple[str, ...]] = ("anchor",)

    def start(self, w: Tensor) -> Vector:
        """The anchor is the parameter."""
        return (w.clone(),)

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Both halves."""
        e = self.lr * self.ascent(w, g)
        anchor = slots[0] - e
        return anchor - e, (anchor,)


@dataclass(frozen=True, kw_only=True)
class OptimisticSGDRule(LinearRule):
    """:class:`OptimisticSGD`: w ← w − α(2eₜ − eₜ₋₁)."""

    slots: ClassVar[tuple[str, ...]] = ("previous_grad",)

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """The buffer is the gradient before."""
        e = self.ascent(w, g)
        return w - self.lr * (2 * e - slots[0]), (e,)


@dataclass(frozen=True, kw_only=True)
class AdaptiveRule(Descent):
    """Adam's quotient d = p/(√v̂ + ε), with v ← β₂v + (1−β₂)e² and v̂ = v/(1−β₂ᵗ); p is linear in (e, buffers).

    Its derivative is dp/(√v̂ + ε) − p·d√v̂/(√v̂ + ε)² with d√v̂ = dv̂/(2√v̂), and 0 where v is 0.
    """

    beta2: float
    eps: float

    def _square(self, v: Tensor, e: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * e * e

    def _root(self, v: Tensor, t: Tensor) -> Tensor:
        """√v̂, with derivative 0 instead of NaN where v is 0."""
        corrected = v / (1 - self.beta2**t)
        positive = corrected > 0
        return torch.where(positive, torch.where(positive, corrected, 1.0).sqrt(), 0.0)

    def _quotient_tangent(
        self, p: Tensor, v: Tensor, e: Tensor, t: Tensor, dp: Tensor, dv: Tensor, de: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(d(p/(√v̂+ε)), dv′), with p and v those after the step and dv the tangent before it."""
        dv = self.beta2 * dv + 2 * (1 - self.beta2) * e * de
        root = self._root(v, t)
        divisor = torch.where(root > 0, 2 * (1 - self.beta2**t) * root, torch.inf)
        denominator = root + self.eps
        return (dp - p * (dv / divisor) / denominator) / denominator, dv


@dataclass(frozen=True, kw_only=True)
class AdamRule(AdaptiveRule):
    """``torch.optim.Adam``, and ``AdamW`` with a decoupled decay w ← (1 − αλ)w."""

    beta1: float
    decoupled: bool = False
    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def ascent(self, w: Tensor, g: Tensor) -> Tensor:
        """A decoupled decay is no part of the gradient."""
        if self.decoupled:
            return -g if self.maximize else g
        return super().ascent(w, g)

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """w ← (1 − αλ)w − α m̂/(√v̂ + ε)."""
        e = self.ascent(w, g)
        m = self.beta1 * slots[0] + (1 - self.beta1) * e
        v = self._square(slots[1], e)
        kept = 1 - self.lr * self.weight_decay if self.decoupled else 1.0
        return kept * w - self.lr * (m / (1 - self.beta1**t)) / (self._root(v, t) + self.eps), (m, v)

    def tangent(
        self, w: Tensor, g: Tensor, slots: Vector, t: Tensor, dw: Tensor, dg: Tensor, dslots: Vector
    ) -> tuple[Tensor, Vector]:
        """In closed form."""
        e, de = self.ascent(w, g), self.ascent(dw, dg)
        m, dm = (self.beta1 * a + (1 - self.beta1) * b for a, b in ((slots[0], e), (dslots[0], de)))
        correction = 1 - self.beta1**t
        dd, dv = self._quotient_tangent(
            m / correction, self._square(slots[1], e), e, t, dm / correction, dslots[1], de
        )
        kept = 1 - self.lr * self.weight_decay if self.decoupled else 1.0
        return kept * dw - self.lr * dd, (dm, dv)


@dataclass(frozen=True, kw_only=True)
class OptimisticAdamRule(AdaptiveRule):
    """:class:`OptimisticAdam`: w ← w − α(2dₜ − dₜ₋₁) with Adam's direction d."""

    beta1: float
    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "previous_direction")

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """The third buffer is the direction before."""
        e = self.ascent(w, g)
        m = self.beta1 * slots[0] + (1 - self.beta1) * e
        v = self._square(slots[1], e)
        d = (m / (1 - self.beta1**t)) / (self._root(v, t) + self.eps)
        return w - self.lr * (2 * d - slots[2]), (m, v, d)

    def tangent(
        self, w: Tensor, g: Tensor, slots: Vector, t: Tensor, dw: Tensor, dg: Tensor, dslots: Vector
    ) -> tuple[Tensor, Vector]:
        """In closed form."""
        e, de = self.ascent(w, g), self.ascent(dw, dg)
        m, dm = (self.beta1 * a + (1 - self.beta1) * b for a, b in ((slots[0], e), (dslots[0], de)))
        correction = 1 - self.beta1**t
        dd, dv = self._quotient_tangent(
            m / correction, self._square(slots[1], e), e, t, dm / correction, dslots[1], de
        )
        return dw - self.lr * (2 * dd - dslots[2]), (dm, dv, dd)


@dataclass(frozen=True, kw_only=True)
class ComplexAdamRule(AdaptiveRule):
    """:class:`ComplexAdam`: m ← β₁m + e, w ← w − α Re(κm)/(√v̂ + ε), κ = 1, or (1−β₁)/(1−β₁ᵗ) with debias."""

    momentum: float
    phase: float
    debias: bool = False
    slots: ClassVar[tuple[str, ...]] = ("momentum_buffer", "momentum_buffer_imag", "exp_avg_sq")

    def _moments(self, a: Tensor, b: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        c, s = self.momentum * math.cos(self.phase), self.momentum * math.sin(self.phase)
        return c * a - s * b + e, s * a + c * b

    def _direction(self, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        """Re(κm)."""
        if not self.debias:
            return a
        c, s = self.momentum * math.cos(self.phase), self.momentum * math.sin(self.phase)
        size = self.momentum**t
        x, y = 1 - size * torch.cos(self.phase * t), -size * torch.sin(self.phase * t)  # 1 − β₁ᵗ
        real = ((1 - c) * x - s * y) / (x * x + y * y)
        imag = (-s * x - (1 - c) * y) / (x * x + y * y)
        return real * a - imag * b

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Real and imaginary part, and v."""
        e = self.ascent(w, g)
        a, b = self._moments(slots[0], slots[1], e)
        v = self._square(slots[2], e)
        return w - self.lr * self._direction(a, b, t) / (self._root(v, t) + self.eps), (a, b, v)

    def tangent(
        self, w: Tensor, g: Tensor, slots: Vector, t: Tensor, dw: Tensor, dg: Tensor, dslots: Vector
    ) -> tuple[Tensor, Vector]:
        """In closed form."""
        e, de = self.ascent(w, g), self.ascent(dw, dg)
        a, b = self._moments(slots[0], slots[1], e)
        da, db = self._moments(dslots[0], dslots[1], de)
        p, dp = self._direction(a, b, t), self._direction(da, db, t)
        dd, dv = self._quotient_tangent(p, self._square(slots[2], e), e, t, dp, dslots[2], de)
        return dw - self.lr * dd, (da, db, dv)


def known_rule(optimizer: Optimizer, group: Mapping[str, Any]) -> UpdateRule:
    """The rule of a parameter group's optimizer with the group's options."""
    kind = type(optimizer)
    number = {name: float(value) for name, value in group.items() if isinstance(value, (int, float, Tensor))}
    lr, decay, maximize = number["lr"], number.get("weight_decay", 0.0), bool(group.get("maximize", False))
    descent = partial(_with, lr=lr, weight_decay=decay, maximize=maximize)
    if group.get("amsgrad", False):
        raise ValueError(
            "update_map knows Adam without amsgrad. Got amsgrad=True; pass rule= with a re-statement."
        )
    if kind is torch.optim.SGD:
        nesterov = bool(group["nesterov"])
        return descent(SGDRule, momentum=number["momentum"], dampening=number["dampening"], nesterov=nesterov)
    if kind is ComplexSGD:
        return descent(ComplexSGDRule, momentum=number["momentum"], phase=number["phase"])
    plain = {
        Extragradient: ExtragradientRule,
        ExtrapolationFromThePast: PastRule,
        OptimisticSGD: OptimisticSGDRule,
    }
    if kind in plain:
        return descent(plain[kind])
    if kind in (torch.optim.Adam, torch.optim.AdamW, ComplexAdam, OptimisticAdam):
        beta1, beta2 = (float(b) for b in group["betas"])
        adaptive = partial(descent, beta2=beta2, eps=number["eps"])
        if kind is ComplexAdam:
            return adaptive(
                ComplexAdamRule, momentum=beta1, phase=number["phase"], debias=bool(group["debias"])
            )
        if kind is OptimisticAdam:
            return adaptive(OptimisticAdamRule, beta1=beta1)
        decoupled = kind is torch.optim.AdamW or bool(group.get("decoupled_weight_decay", False))
        return adaptive(AdamRule, beta1=beta1, decoupled=decoupled)
    raise ValueError(
        "update_map knows SGD, Adam, AdamW, ComplexSGD, ComplexAdam, Extragradient, ExtrapolationFromThePast, "
        f"OptimisticSGD and OptimisticAdam. Got {kind.__name__}; pass rule= with a re-statement of its step: a "
        "subclass of lightning_nested.dynamics.UpdateRule."
    )


def _with(rule: Callable[..., UpdateRule], **options: Any) -> UpdateRule:
    return rule(**options)
