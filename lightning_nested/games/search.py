"""Minimise a rate over momentum settings: a largest modulus of roots, so neither smooth nor convex.

A point holds the settings of one player or of several, in whatever coordinates its objective reads. It stays inside a
box: the whole range of the settings, or what one change in a running game may reach; it has no width where a setting is
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
from scipy.optimize import minimize

from lightning_nested.games.rates import Array

Objective: TypeAlias = "Callable[[Array], float]"  # of a point, shape (n,)

_LEAST_GAIN = 1e-9  # of the rate: less is rounding


def search(
    objective: Objective,
    start: Array,
    bounds: Array,
    sizes: Iterable[float | Array],
    *,
    evaluations: int,
    moves: Sequence[Array] = (),
) -> Array:
    """A point of the box where the objective is smaller, else the start: by single moves, then by Nelder-Mead.

    Args:
        objective: What to minimise.
        start: Of shape (n,), inside the bounds.
        bounds: Lowest and highest value of each coordinate, shape (n, 2); where they are equal it keeps its value.
        sizes: Of the simplices, one after the other, each begun where the last one stopped; of all coordinates, or of
            each, shape (n,).
        evaluations: Of the objective, per simplex and free coordinate.
        moves: Steps of shape (n,) to try first, each from the best point so far.

    Returns:
        A point of shape (n,) inside the bounds.

    Example:
        >>> bounds = np.array([[-1.0, 1.0], [0.5, 2.0]])
        >>> objective = lambda x: float(np.abs(x).max())
        >>> search(objective, bounds[:, 1], bounds, (0.5, 0.05, 0.005), evaluations=50).round(6)[1]
        np.float64(0.5)
    """
    point, best = start, objective(start)
    for move in moves:
        trial = np.clip(point + move, *bounds.T)
        if (trial != point).any() and (rate := objective(trial)) < best - _LEAST_GAIN:
            point, best = trial, rate
    free = bounds[:, 1] > bounds[:, 0]
    count = int(free.sum())
    low, high = bounds[free].T
    if count == 0:
        return point

    def whole(x: Array) -> Array:
        found: Array = point.copy()
        found[free] = np.clip(x, low, high)
        return found

    # Off the axes, which are often symmetric.
    tilt = np.eye(count) + 0.2 * np.sin(3 * np.arange(count)[:, None] + 7 * np.arange(count) + 1)
    for size in sizes:
        simplex = point[free] + np.vstack([np.zeros(count), tilt * np.broadcast_to(size, point.shape)[free]])
        options = {
            "maxfev": evaluations * count,
            "xatol": 1e-9,
            "fatol": 1e-10,
            "initial_simplex": simplex,
        }
        end = minimize(lambda x: objective(whole(x)), point[free], method="Nelder-Mead", options=options)
        if end.fun < best - _LEAST_GAIN:
            point, best = whole(end.x), float(end.fun)
    return point
