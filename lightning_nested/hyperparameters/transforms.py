"""Transforms between the unconstrained tensor that an optimizer moves and the value in natural units."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightning_nested.arguments import checked, positive


class Transform(ABC):
    """A differentiable map from all reals to the allowed values, with a stable inverse."""

    @property
    def resolution(self) -> float:
        """Largest move by :meth:`project_` of a value near an end of the range that counts as rounding."""
        return 0.0

    @abstractmethod
    def forward(self, raw: Tensor) -> Tensor:
        """Return the natural value of an unconstrained tensor."""

    @abstractmethod
    def inverse(self, value: Tensor) -> Tensor:
        """Return the unconstrained tensor of a natural value.

        Raises:
            ValueError: The value lies outside the range.
        """

    def start(self, value: Tensor) -> Tensor:
        """Return the unconstrained tensor of an initial value.

        Raises:
            ValueError: The value lies outside the range, or where :meth:`project_` would move it.
        """
        raw = self.inverse(value)
        projected = raw.clone()
        self.project_(projected)
        moved = (projected - raw).abs() > 1e-5 * (1.0 + raw.abs())  # more than rounding
        if bool(moved.any()):
            start, end = (float(v[moved].flatten()[0]) for v in (value, self.forward(projected)))
            raise ValueError(
                f"A start must lie inside the bounds of its transform. Got {start:g}, which the first outer step would "
                f"move to {end:g} by {self}; widen the transform, or start there."
            )
        return raw

    def project_(self, raw: Tensor) -> None:  # noqa: B027
        """Move ``raw`` back into the range where the transform is well conditioned, in place; by default nowhere."""


def _require(condition: Tensor, requirement: str, value: Tensor) -> None:
    if not bool(condition.all()):
        bad = value[~condition].flatten()[0]
        raise ValueError(f"value must be {requirement}. Got {float(bad):g}.")


@dataclass(frozen=True, kw_only=True)
class Unconstrained(Transform):
    """value = raw."""

    def forward(self, raw: Tensor) -> Tensor:
        """Return the tensor itself."""
        return raw

    def inverse(self, value: Tensor) -> Tensor:
        """Return the tensor itself."""
        return value


@checked
@dataclass(frozen=True, kw_only=True)
class Exp(Transform):
    """value = exp(raw) > 0: a step of the optimizer is a factor. Projected into [lower, upper] after each step.

    Bounds keep a large outer rate from running a decay to overflow or to nothing; inside them the transform is the
    plain exponential.

    >>> Exp(upper=10.0).forward(torch.tensor(0.0)).item()
    1.0
    """

    lower: float = 1e-12
    upper: float = 1e6

    def __post_init__(self) -> None:
        if not 0 < self.lower < self.upper:
            raise ValueError(f"0 < lower < upper must hold. Got lower={self.lower}, upper={self.upper}.")

    def forward(self, raw: Tensor) -> Tensor:
        """exp(raw)."""
        return raw.exp()

    def inverse(self, value: Tensor) -> Tensor:
        """log(value)."""
        _require(value > 0, "positive", value)
        return value.log()

    def project_(self, raw: Tensor) -> None:
        """Clamp log values to the bounds."""
        raw.clamp_(math.log(self.lower), math.log(self.upper))


@dataclass(frozen=True, kw_only=True)
class Softplus(Transform):
    """value = log(1 + exp(raw)) > 0: exponential when small, linear when large."""

    def forward(self, raw: Tensor) -> Tensor:
        """log(1 + exp(raw))."""
        return functional.softplus(raw)

    def inverse(self, value: Tensor) -> Tensor:
        """log(exp(value) − 1), as value + log(1 − exp(−value)) so that it never overflows."""
        _require(value > 0, "positive", value)
        return value + torch.log(-torch.expm1(-value))


@checked
@dataclass(frozen=True, kw_only=True)
class Interval(Transform):
    """value = lower + (upper − lower)·σ(raw), in the open interval (lower, upper).

    ``raw`` is projected into ±limit after each step, where the slope is still σ′(limit), so that no entry gets
    stuck at an end of the interval.

    >>> Interval(lower=0.0, upper=2.0).forward(torch.tensor(0.0)).item()
    1.0
    """

    lower: float = 0.0
    upper: float = 1.0
    limit: float = 8.0

    def __post_init__(self) -> None:
        if not self.lower < self.upper:
            raise ValueError(f"lower < upper must hold. Got lower={self.lower}, upper={self.upper}.")
        positive(limit=self.limit)

    @property
    def resolution(self) -> float:
        """(upper − lower)·σ(−limit): how close to an end of the interval values come."""
        return (self.upper - self.lower) / (1.0 + math.exp(min(self.limit, 700.0)))

    def forward(self, raw: Tensor) -> Tensor:
        """lower + (upper − lower)·σ(raw)."""
        return self.lower + (self.upper - self.lower) * torch.sigmoid(raw)

    def inverse(self, value: Tensor) -> Tensor:
        """log(value − lower) − log(upper − value)."""
        inside = (value > self.lower) & (value < self.upper)
        _require(inside, f"inside ({self.lower}, {self.upper})", value)
        return (value - self.lower).log() - (self.upper - value).log()

    def project_(self, raw: Tensor) -> None:
        """Clamp to ±limit."""
        raw.clamp_(-self.limit, self.limit)


@dataclass(frozen=True, kw_only=True)
class Simplex(Transform):
    """value = softmax(raw) over the last dimension: positive and of sum 1."""

    def forward(self, raw: Tensor) -> Tensor:
        """softmax(raw)."""
        return torch.softmax(raw, dim=-1)

    def inverse(self, value: Tensor) -> Tensor:
        """log(value), of mean zero."""
        _require(value > 0, "positive", value)
        total = value.sum(-1)
        _require((total - 1).abs() < 1e-4, "of sum 1 over the last dimension", total)
        log = value.log()
        return log - log.mean(-1, keepdim=True)
