"""What an optimizer does to one parameter and its buffers, as pure functions with closed-form derivatives.

A rule that is linear in (w, g, buffers) pushes tangents as it pushes values; the Adam family has one quotient to
differentiate. Either way a tangent costs one pass over the parameter beside its Hessian product. The rules of the
known optimizers are in ``lightning_nested.optim.registry``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_nested.linalg.vectors import Vector

Kind: TypeAlias = Literal["momentum", "extragradient", "optimistic", "unknown"]


@dataclass(frozen=True)
class Momentum:
    """Part of an optimizer's step that follows from the gradient and earlier ones, besides the scale D.

    Attributes:
        kind: ``"momentum"``: μ ← βμ − g, w ← w + D·Re μ; ``"extragradient"`` and ``"optimistic"``: those updates;
            ``"unknown"``: none of them, so no rate can be predicted.
        momentum: |β|.
        phase: arg β.
    """

    kind: Kind
    momentum: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True, kw_only=True)
class UpdateRule(ABC):
    """One step of an optimizer on one parameter. Subclass it to re-state an optimizer of your own.

    ``step`` is all that must be written, in operations that ``torch.func`` differentiates; ``tangent`` then follows
    from it, and may be overridden with a closed form.
    """

    slots: ClassVar[tuple[str, ...]] = ()  # the buffers, by their names in ``optimizer.state``
    num_gradients: ClassVar[int] = 1

    def start(self, w: Tensor) -> Vector:
        """Return the buffers before the first step: zeros."""
        return tuple(torch.zeros_like(w) for _ in self.slots)

    def resume(self, w: Tensor, state: Mapping[str, Any]) -> tuple[Vector, float]:
        """Return the buffers and the number of steps taken from one parameter's entry in ``optimizer.state``.

        Buffers that are missing are those before the first step. Optimizers without a count have taken 0 steps
        before there is a buffer, and 1 from then on.
        """
        fresh = self.start(w)
        kept = [state.get(name) for name in self.slots[: len(fresh)]]
        begun = any(buffer is not None for buffer in kept)
        buffers = tuple(f if k is None else k for f, k in zip(fresh, kept, strict=True))
        return buffers, float(state.get("step", 1)) if begun else 0.0

    @abstractmethod
    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Return the next parameter and buffers, as new tensors.

        Args:
            w: Parameter.
            g: Its gradient.
            slots: Its buffers.
            t: Number of this step, from 1; a 0-dimensional floating-point tensor.
        """

    def tangent(
        self, w: Tensor, g: Tensor, slots: Vector, t: Tensor, dw: Tensor, dg: Tensor, dslots: Vector
    ) -> tuple[Tensor, Vector]:
        """Return the derivative of :meth:`step` along (dw, dg, dslots), in the shapes of (w, g, slots)."""

        def flat(w: Tensor, g: Tensor, *slots: Tensor) -> Vector:
            after, buffers = self.step(w, g, slots, t)
            return (after, *buffers)

        derivative: Vector = torch.func.jvp(flat, (w, g, *slots), (dw, dg, *dslots))[1]
        return derivative[0], derivative[1:]


@dataclass(frozen=True, kw_only=True)
class Descent(UpdateRule):
    """A rule with a learning rate, weight decay and a direction; fields are named as the options of its optimizer.

    ``ascent`` is e = ±g + λw, the gradient as torch's optimizers use it.
    """

    lr: float  # α
    weight_decay: float = 0.0  # λ
    maximize: bool = False
    kind: ClassVar[Kind] = "unknown"

    def ascent(self, w: Tensor, g: Tensor) -> Tensor:
        """Return ±g + λw, linear in both, so tangents go through it as well."""
        signed = -g if self.maximize else g
        return signed + self.weight_decay * w if self.weight_decay else signed

    def momentum_kind(self) -> Momentum:
        """Return what the step makes of older gradients."""
        return Momentum(self.kind)

    def scale(self, state: Mapping[str, Any]) -> Tensor | float:
        """Return D of the coming step w ← w − D·(momentum of g), with the second moments of ``state``."""
        return self.lr


class LinearRule(Descent):
    """A rule linear in (w, g, buffers): its derivative is itself."""

    def tangent(
        self, w: Tensor, g: Tensor, slots: Vector, t: Tensor, dw: Tensor, dg: Tensor, dslots: Vector
    ) -> tuple[Tensor, Vector]:
        """Take the same step with the tangents."""
        return self.step(dw, dg, dslots, t)


@dataclass(frozen=True, kw_only=True)
class AdaptiveRule(Descent):
    """Adam's quotient d = p/(√v̂ + ε), with v ← β₂v + (1−β₂)e² and v̂ = v/(1−β₂ᵗ); p is linear in (e, buffers).

    Its derivative is dp/(√v̂ + ε) − p·d√v̂/(√v̂ + ε)² with d√v̂ = dv̂/(2√v̂), and 0 where v is 0. A subclass says
    what p is (``moments``), and where d goes (``move``).
    """

    beta1: float
    beta2: float
    eps: float
    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    second: ClassVar[str] = "exp_avg_sq"  # the buffer that divides

    @abstractmethod
    def moments(self, e: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Return p and the next first moments, linear in e and the buffers."""

    def move(self, w: Tensor, d: Tensor, slots: Vector, after: Vector) -> tuple[Tensor, Vector]:
        """Return the next parameter and buffers, linear in all arguments; ``after`` are the new moments and v."""
        return w - self.lr * d, after

    def step(self, w: Tensor, g: Tensor, slots: Vector, t: Tensor) -> tuple[Tensor, Vector]:
        """Take the step."""
        e = self.ascent(w, g)
        p, moments = self.moments(e, slots, t)
        v = self._square(slots, e)
        return self.move(w, p / (self._root(v, t) + self.eps), slots, (*moments, v))

    def tangent(
        self, w: Tensor, g: Tensor, slots: Vector, t: Tensor, dw: Tensor, dg: Tensor, dslots: Vector
    ) -> tuple[Tensor, Vector]:
        """Return the derivative of :meth:`step` in closed form."""
        e, de = self.ascent(w, g), self.ascent(dw, dg)
        p, _ = self.moments(e, slots, t)
        dp, dmoments = self.moments(de, dslots, t)
        dv = self.beta2 * dslots[self.slots.index("exp_avg_sq")] + 2 * (1 - self.beta2) * e * de
        root = self._root(self._square(slots, e), t)
        divisor = torch.where(root > 0, 2 * (1 - self.beta2**t) * root, torch.inf)
        denominator = root + self.eps
        dd = (dp - p * (dv / divisor) / denominator) / denominator
        return self.move(dw, dd, dslots, (*dmoments, dv))

    def gain(self, t: float) -> float:
        """Return the factor of the newest gradient in p after t steps: (1 − β₁)/(1 − β₁ᵗ) in Adam's average."""
        share: float = 1 - self.beta1**t
        return (1 - self.beta1) / share

    def scale(self, state: Mapping[str, Any]) -> Tensor | float:
        """Return α·gain/(√v̂ + ε) as if v̂ stood still; without the quotient before the first step."""
        if self.second not in state:
            return self.lr * self.gain(math.inf)
        return self.lr * self.gain(float(state["step"])) / self.divisor(state)

    @torch.no_grad()
    def divisor(self, state: Mapping[str, Any]) -> Tensor:
        """Return √v̂ + ε, a new tensor."""
        second: Tensor = state[self.second]
        return second.div(1 - self.beta2 ** float(state["step"])).sqrt_().add_(self.eps)

    def _square(self, slots: Vector, e: Tensor) -> Tensor:
        return self.beta2 * slots[self.slots.index("exp_avg_sq")] + (1 - self.beta2) * e * e

    def _root(self, v: Tensor, t: Tensor | float) -> Tensor:
        """√v̂, with derivative 0 instead of NaN where v is 0."""
        corrected = v / (1 - self.beta2**t)
        positive = corrected > 0
        return torch.where(positive, torch.where(positive, corrected, 1.0).sqrt(), 0.0)
