"""Runs of a game of two players with many optimizer settings side by side, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Field = tuple[Callable[[Array, Array], Array], Callable[[Array, Array], Array]]
"""The gradient of each player's loss in its own numbers, at x and y of shape (…, n)."""


def quadratic(own: Array, coupling: Array) -> Field:
    """Return the field (ax + by, ay − bx) of a and b, each of shape (n,)."""
    return lambda x, y: own * x + coupling * y, lambda x, y: own * y - coupling * x


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings to run side by side, one row each."""

    lr: Array
    # Complex momentum and, as booleans, alternating order; used by "momentum" alone.
    beta: Array
    alternating: Array
    # "momentum", "optimistic" or "extragradient".
    method: str = "momentum"

    def take(self, rows: Array) -> Settings:
        """Return some of the settings."""
        return Settings(
            lr=self.lr[rows], beta=self.beta[rows], alternating=self.alternating[rows], method=self.method
        )


def evaluations(
    field: Field, start: tuple[Array, Array], settings: Settings, tolerance: float, limit: int
) -> Array:
    """Count evaluations of the joint gradient until ‖(x, y)‖ falls to ``tolerance`` of its start.

    Args:
        field: The game; its solution is 0.
        start: x and y, each of shape (n,).
        settings: s settings of one method.
        tolerance: Relative distance.
        limit: Evaluations after which a run is given up.

    Returns:
        Float64 of shape (s,), infinite where the tolerance was not reached.
    """
    cost = 2 if settings.method == "extragradient" else 1
    found = np.full(len(settings.lr), np.inf)
    rows = np.arange(len(settings.lr))
    x, y = (np.tile(v, (len(rows), 1)) for v in start)
    memory = [np.zeros_like(x, dtype=complex), np.zeros_like(y, dtype=complex)]
    first = math.hypot(*(float(np.linalg.norm(v)) for v in start))
    running = settings
    for step in range(1, limit // cost + 1):
        x, y = _step(x, y, field, running, memory, first_step=step == 1)
        size = np.sqrt((x * x + y * y).sum(axis=1)) / first
        arrived = size <= tolerance
        found[rows[arrived]] = step * cost
        if (keep := ~arrived & (size < 1e8)).all():
            continue
        rows, x, y, memory = rows[keep], x[keep], y[keep], [m[keep] for m in memory]
        running = settings.take(rows)
        if not len(rows):
            break
    return found


def _step(
    x: Array, y: Array, field: Field, settings: Settings, memory: list[Array], *, first_step: bool
) -> tuple[Array, Array]:
    """Do one step of every setting; update ``memory``, the momentum or the last gradient."""
    of_first, of_second = field
    lr = settings.lr[:, None]
    gx, gy = of_first(x, y), of_second(x, y)
    if settings.method == "extragradient":
        hx, hy = x - lr * gx, y - lr * gy
        return x - lr * of_first(hx, hy), y - lr * of_second(hx, hy)
    if settings.method == "optimistic":
        last = (gx, gy) if first_step else (memory[0].real, memory[1].real)
        memory[:] = [gx.astype(complex), gy.astype(complex)]
        return x - lr * (2 * gx - last[0]), y - lr * (2 * gy - last[1])
    beta = settings.beta[:, None]
    memory[0] = beta * memory[0] - gx
    moved = x + lr * memory[0].real
    gy = of_second(np.where(settings.alternating[:, None], moved, x), y)
    memory[1] = beta * memory[1] - gy
    return moved, y + lr * memory[1].real
