"""Where the outer loss is differentiated: at the current weights, or where the training is heading.

The implicit formula is exact at the end of the inner training. In its middle, the outer gradient at the current
weights rewards what the training would do anyway: while a network still learns, less decay always looks better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.linalg.vectors import Vector


class EvaluationPoint:
    """Weights at which the outer gradient is taken: :class:`Current` or :class:`LookAhead`."""


@dataclass(frozen=True, kw_only=True)
class Current(EvaluationPoint):
    """The current weights: exact where the inner training has converged."""


@checked
@dataclass(frozen=True, kw_only=True)
class LookAhead(EvaluationPoint):
    """The weights that the rest of the training is predicted to reach, w′ = w − z·min(1, r‖w‖/‖z‖) per tensor.

    w − z with z = (F + D + 1/(R·t))⁻¹m minimises a quadratic model of the regularized training loss, as far as the
    remaining steps can get: m is the running mean of the inner gradient, F the Kronecker-factored Fisher
    information, D the weight decay, R the optimizer's long-run step per unit of gradient and t the remaining steps.
    The trust radius r grows by a half where the training loss falls from w to w′, and halves where it rises. The
    statistics of the run are in ``lightning_nested.trainer.forecast``.

    Args:
        start_radius: First r.
        min_radius: Smallest r.
        max_radius: Largest r.
        refresh_every: Outer steps between two factorizations of F.
        max_size: Layers of more inputs or outputs have a diagonal F.

    Raises:
        ValueError: A radius is not positive, or they are not in order.
    """

    start_radius: float = 0.1
    min_radius: float = 0.02
    max_radius: float = 1.0
    refresh_every: int = 4
    max_size: int = 2048

    def __post_init__(self) -> None:
        positive(start_radius=self.start_radius, min_radius=self.min_radius, max_radius=self.max_radius)
        at_least(1, refresh_every=self.refresh_every, max_size=self.max_size)
        if not self.min_radius <= self.start_radius <= self.max_radius:
            raise ValueError(
                "min_radius <= start_radius <= max_radius must hold. "
                f"Got {self.min_radius}, {self.start_radius}, {self.max_radius}."
            )

    @torch.no_grad()
    def weights(self, weights: Vector, direction: Vector, radius: float) -> Vector:
        """Return w′, one new tensor per parameter."""
        moved = []
        for w, z in zip(weights, direction, strict=True):
            length = torch.linalg.vector_norm(z)
            share = (radius * torch.linalg.vector_norm(w) / length.clamp_min(1e-30)).clamp_max(1.0)
            moved.append(torch.where(length > 0, w - share * z, w))
        return tuple(moved)

    def next_radius(self, radius: float, *, fell: bool) -> float:
        """Return r after a look at the training loss."""
        return min(self.max_radius, radius * 1.5) if fell else max(self.min_radius, radius * 0.5)


@contextmanager
def placed_at(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Give the parameters other values until exit. Graphs that were built before can be differentiated after it."""
    kept = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.data = value
        # Inside autocast, forward passes reuse casts of the weights that an earlier one made.
        torch.clear_autocast_cache()
        yield
    finally:
        for p, data in zip(parameters, kept, strict=True):
            p.data = data
        torch.clear_autocast_cache()
