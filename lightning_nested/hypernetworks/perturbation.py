"""Distributions of the tried hyperparameters: around λ with a learned or fixed scale, or everywhere."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from lightning_nested.arguments import at_least, checked, positive


class Perturbation(ABC):
    """Strategy for the distribution of h during training, in unconstrained units."""

    entropy_weight: float = 0.0  # τ
    antithetic: bool = False
    signs: bool = False

    def initial(self, center: Tensor) -> Tensor | None:
        """Return the unconstrained scales s to learn, (n,); None where nothing is learned."""
        return None

    @abstractmethod
    def sample(self, center: Tensor, scale: Tensor | None, noise: Tensor) -> Tensor:
        """Return h for standard normal ``noise``, (n,) or (batch, n), with its graph to center and scale."""

    def bonus(self, scale: Tensor | None) -> Tensor | None:
        """Return a number to subtract from the outer loss; None: nothing."""
        return None

    def draw(self, center: Tensor, size: int | None, generator: torch.Generator) -> Tensor:
        """Draw noise of mean 0 and variance 1: (n,), or (size, n)."""
        if self.antithetic and size is not None:
            if size < 2:
                raise ValueError(f"antithetic=True needs a batch of at least 2 examples. Got {size}.")
            half = self._noise(((size + 1) // 2, *center.shape), center, generator)
            return torch.cat([half, -half])[:size]
        return self._noise(center.shape if size is None else (size, *center.shape), center, generator)

    def _noise(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)
        return torch.where(noise < 0, -1.0, 1.0).to(like.dtype) if self.signs else noise


@checked
@dataclass(frozen=True, kw_only=True)
class LearnedScale(Perturbation):
    """h = λ + softplus(s) ∘ ε, ε ~ N(0, I); s descends L_V − τ · entropy. The scale of Self-Tuning Networks.

    Too small a scale and the response forgets its slope; too large and it cannot follow the curve. The entropy
    Σ log σᵢ + const keeps it from vanishing.

    Args:
        init: σ at the start, in unconstrained units.
        entropy_weight: τ.
        antithetic: With one h of each example, the second half of the batch gets the negative noise of the first.
        signs: ε is ±1 instead of normal: the same mean and variance, and less noise in the response's slope.
    """

    init: float = 0.5
    entropy_weight: float = 1e-3
    antithetic: bool = False
    signs: bool = False

    def __post_init__(self) -> None:
        positive(init=self.init)
        at_least(0, entropy_weight=self.entropy_weight)

    def initial(self, center: Tensor) -> Tensor | None:
        """s with softplus(s) = init."""
        return torch.full_like(center, self.init + math.log(-math.expm1(-self.init)))

    def sample(self, center: Tensor, scale: Tensor | None, noise: Tensor) -> Tensor:
        """λ + softplus(s) ∘ ε."""
        return center if scale is None else center + functional.softplus(scale) * noise

    def bonus(self, scale: Tensor | None) -> Tensor | None:
        """τ times the entropy of N(λ, σ²)."""
        if scale is None or self.entropy_weight == 0:
            return None
        constant = 0.5 * math.log(2 * math.pi * math.e)
        return self.entropy_weight * (functional.softplus(scale).log() + constant).sum()


@checked
@dataclass(frozen=True, kw_only=True)
class FixedScale(Perturbation):
    """h = λ + σ ε: the local hypernetwork.

    Args:
        scale: σ, in unconstrained units.
        antithetic: See :class:`LearnedScale`.
        signs: See :class:`LearnedScale`.
    """

    scale: float = 0.1
    antithetic: bool = False
    signs: bool = False

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be positive. Got {self.scale}; for none give NoPerturbation().")

    def sample(self, center: Tensor, scale: Tensor | None, noise: Tensor) -> Tensor:
        """λ + σ ε."""
        return center + self.scale * noise


@checked
@dataclass(frozen=True, kw_only=True)
class GlobalNormal(Perturbation):
    """h ~ N(mean, scale²) wherever λ is: the global hypernetwork's p(λ).

    Args:
        mean: In unconstrained units: one for all, or one of each.
        scale: Standard deviation.
        signs: See :class:`LearnedScale`.
    """

    mean: float | tuple[float, ...] = 0.0
    scale: float = 1.0
    signs: bool = False

    def __post_init__(self) -> None:
        positive(scale=self.scale)

    def sample(self, center: Tensor, scale: Tensor | None, noise: Tensor) -> Tensor:
        """mean + scale ε."""
        mean = torch.as_tensor(self.mean, dtype=center.dtype, device=center.device)
        if mean.dim() == 1 and len(mean) != len(center):
            raise ValueError(f"mean must have one number, or {len(center)}. Got {len(mean)}.")
        return mean + self.scale * noise


@checked
@dataclass(frozen=True, kw_only=True)
class GlobalUniform(Perturbation):
    """h uniform in [low, high] wherever λ is.

    Args:
        low: Lower end in unconstrained units (log decay for a decay).
        high: Upper end.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low < high must hold. Got {self.low} and {self.high}.")

    def sample(self, center: Tensor, scale: Tensor | None, noise: Tensor) -> Tensor:
        """low + (high − low) Φ(ε)."""
        return self.low + (self.high - self.low) * cast("Tensor", torch.special.ndtr(noise))


@dataclass(frozen=True, kw_only=True)
class NoPerturbation(Perturbation):
    """h = λ: the simplified algorithm, where λ's own movement is all that the response learns from."""

    def sample(self, center: Tensor, scale: Tensor | None, noise: Tensor) -> Tensor:
        """λ, once for each example if ``noise`` is."""
        return center if noise.dim() == 1 else center.expand(noise.shape)
