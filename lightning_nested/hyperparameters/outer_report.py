"""Numbers that describe one outer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

Spread: TypeAlias = list[float]
"""Mean, smallest and largest value of a hyperparameter, and the number of its values."""


@dataclass(frozen=True, kw_only=True)
class OuterReport:
    """Diagnostics of an outer step; NaN where unknown. ``OuterStep`` fills them in, ``OuterLoop`` logs them."""

    outer_loss: float  # mean over processes
    hypergradient_norm: float  # ‖dL_V/dλ‖ with respect to the unconstrained tensors
    inner_gradient_norm: float = math.nan  # with the penalties; the implicit formula is exact where it is 0
    residual: float = math.nan  # relative, of the solve
    iterations: int = 0  # products with the curvature
    curvature: float = math.nan  # smallest Rayleigh quotient met
    negative_curvature: bool = False  # True if the solve stopped there
    identity_cosine: float = math.nan  # to the hypergradient of Identity(), if asked for

    def metrics(self) -> dict[str, float]:
        """Return the finite numbers by name, to log."""
        return {key: float(value) for key, value in asdict(self).items() if math.isfinite(value)}


class LossTrend:
    """First and last outer losses of a run: whether the tuning has lowered them, beyond the noise of single batches.

    >>> trend = LossTrend()
    >>> for loss in (4.0, 2.0, 1.0, 0.5):
    ...     trend.add(loss)
    >>> trend.lines()
    ['outer loss: 3 → 0.75 (means of the first and last 2 outer steps), improved: 4 outer steps are few to judge by']
    """

    FEW = 5

    def __init__(self) -> None:
        self.count = 0
        self.first: list[float] = []
        self.last: list[float] = []

    def add(self, loss: float) -> None:
        """Take the loss of an outer step."""
        if math.isfinite(loss):
            self.count += 1
            self.first = [*self.first, loss][: self.FEW]
            self.last = [*self.last, loss][-self.FEW :]

    def lines(self, *, moved: bool = True) -> list[str]:
        """Return one line that compares the first losses with the last; none below two outer steps.

        Args:
            moved: Whether any value has changed; else the line does not call a lower loss an improvement.
        """
        few = min(self.FEW, self.count // 2)
        if not few:
            return []
        before, after = sum(self.first[:few]) / few, sum(self.last[-few:]) / few
        verdict = "improved" if after < before else "not improved"
        if self.count < 2 * self.FEW:
            verdict += f": {self.count} outer steps are few to judge by"
        return [
            f"outer loss: {before:.4g} → {after:.4g} (means of the first and last {few} outer steps), "
            f"{verdict if moved else 'but no value moved'}"
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the losses."""
        return {"count": self.count, "first": list(self.first), "last": list(self.last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore."""
        self.count, self.first, self.last = state["count"], list(state["first"]), list(state["last"])


@dataclass
class ValueTrace:
    """Values and outer losses over a run, at the outer steps that are logged."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    values: dict[str, list[Spread]] = field(default_factory=dict)  # by hyperparameter, as long as ``steps``

    def add(self, step: int, loss: float, values: Mapping[str, Spread]) -> None:
        """Take the values after an outer step. A hyperparameter that was not there before had none."""
        missing: Spread = [math.nan, math.nan, math.nan, 0]
        for name, value in values.items():
            self.values.setdefault(name, [missing] * len(self.steps)).append(value)
        self.steps.append(step)
        self.losses.append(loss)
        for seen in self.values.values():
            seen.extend([missing] * (len(self.steps) - len(seen)))


def mean_of(values: Mapping[str, Tensor]) -> float:
    """Return the mean of all values.

    >>> mean_of({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(6.0)})
    3.0
    """
    count = sum(value.numel() for value in values.values())
    total = sum(float(value.detach().mean()) * value.numel() for value in values.values() if value.numel())
    return total / count if count else math.nan


def spread(values: Mapping[str, Tensor]) -> Spread:
    """Return mean, smallest and largest of all values, and their number.

    >>> spread({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(6.0)})
    [3.0, 1.0, 6.0, 3]
    """
    if not any(value.numel() for value in values.values()):
        return [math.nan, math.nan, math.nan, 0]
    flat = torch.cat([value.detach().reshape(-1).double() for value in values.values()])
    return [float(flat.mean()), float(flat.min()), float(flat.max()), flat.numel()]


def summary_line(name: str, first: Spread, last: Spread) -> str:
    """Describe what became of a hyperparameter in a line.

    >>> summary_line("label_smoothing", [0.05, 0.05, 0.05, 1], [0.0712, 0.0712, 0.0712, 1])
    'label_smoothing: 0.05 → 0.0712'
    >>> summary_line("weight_decay", [1e-4, 1e-4, 1e-4, 3], [3e-4, 2e-5, 8e-4, 3])
    'weight_decay (3 values): mean 0.0001 → 0.0003, min 0.0001 → 2e-05, max 0.0001 → 0.0008'
    """
    pairs = [f"{a:.4g} → {b:.4g}" for a, b in zip(first[:3], last[:3], strict=True)]
    if last[3] == 1 and first[3] == 1:
        return f"{name}: {pairs[0]}"
    parts = ", ".join(f"{what} {pair}" for what, pair in zip(("mean", "min", "max"), pairs, strict=True))
    return f"{name} ({last[3]} values): {parts}"
