"""A number that moves from one value to another during training."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal, TypeVar

from lightning_nested.arguments import at_least, checked

T = TypeVar("T")


@checked
@dataclass(frozen=True)
class Anneal:
    """Number a(t) = start + (end − start)·s(min(t/steps, 1)) for an option that changes during training.

    s(u) = u is ``"linear"``, s(u) = (1 − cos πu)/2 ``"cosine"``, which begins and ends slowly. From ``steps`` on it is
    ``end``. The weight of :class:`R1`, :class:`R2` and :class:`GradientPenalty`, the probability of
    :class:`DiffAugment` and the decay of :class:`GeneratorEMA` take one in place of a number;
    :class:`AnnealOptimizer` moves an optimizer's option by one. t counts updates of the game (``GeneratorEMA``: updates
    of the generator). In YAML it is a mapping of its arguments: ``weight: {start: 1.0, end: 0.1, steps: 2000}``.

    Huang et al. (2024), NeurIPS, arXiv 2501.05441, anneal penalties, β₂, augmentation and average together.

    Args:
        start: Value at update 0.
        end: Value at update ``steps`` and later.
        steps: Updates from one to the other.
        shape: ``"linear"`` or ``"cosine"``.

    Example:
        >>> [Anneal(1.0, 0.0, 4).at(t) for t in (0, 1, 4, 9)]
        [1.0, 0.75, 0.0, 0.0]
    """

    start: float
    end: float
    steps: int
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)

    def at(self, step: int) -> float:
        """Return the value at an update."""
        u = min(max(step / self.steps, 0.0), 1.0)
        s = u if self.shape == "linear" else (1.0 - math.cos(math.pi * u)) / 2.0
        return self.start * (1.0 - s) + self.end * s


def ends(value: float | Anneal) -> float | tuple[float, float]:
    """Return the first and the last value of an :class:`Anneal`, for checks of their range; a number unchanged."""
    return (value.start, value.end) if isinstance(value, Anneal) else value


def number(value: float | Anneal, step: int | None = None) -> float:
    """Return the value of an option at an update.

    Raises:
        ValueError: Without ``step``, if the option is an :class:`Anneal`.
    """
    if not isinstance(value, Anneal):
        return value
    if step is None:
        raise ValueError(
            f"An annealed option has no value without an update. Got {value}; take annealed(options, step) first, "
            "as GANModule does."
        )
    return value.at(step)


def annealed(options: T, step: int) -> T:
    """Return a dataclass with the value at an update for every field that is an :class:`Anneal`; others unchanged.

    Example:
        >>> from lightning_nested.modules import R1
        >>> annealed(R1(weight=Anneal(1.0, 0.0, 4)), 3).weight
        0.25
    """
    if not is_dataclass(options):
        return options
    moving = {f.name: v for f in fields(options) if isinstance(v := getattr(options, f.name), Anneal)}
    if not moving:
        return options
    now = copy.copy(options)
    for name, anneal in moving.items():
        # Not by dataclasses.replace: a weight may fade to 0, which a constructor refuses of a number.
        object.__setattr__(now, name, anneal.at(step))
    return now
