"""Search for momentum settings: their rate is a largest modulus of roots, so neither smooth nor convex."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy.optimize import minimize

from lightning_nested.games.rates import Array

_LEAST_GAIN = 1e-9  # of the rate: less is rounding


def search(
    objective: Callable[[Array], float],
    start: Array,
    bounds: Array,
    sizes: Iterable[float | Array],
    *,
    evaluations: int,
    moves: Sequence[Array] = (),
) -> Array:
    """Find a point of a box where the objective is smaller, else the start: by single moves, then by Nelder-Mead.

    Args:
        objective: Function of a point, shape (n,).
        start: Point inside the bounds.
        bounds: Lowest and highest value of each coordinate, shape (n, 2).
        sizes: Sizes of the simplices, each begun where the last one stopped; of shape (n,) or a number for all.
        evaluations: Evaluations of the objective, per simplex and coordinate.
        moves: Steps of shape (n,) to try first, each from the best point so far.

    Example:
        >>> bounds = np.array([[-1.0, 1.0], [0.5, 2.0]])
        >>> objective = lambda x: float(np.abs(x).max())
        >>> float(search(objective, bounds[:, 1], bounds, (0.5, 0.05, 0.005), evaluations=50).round(6)[1])
        0.5
    """
    low, high = bounds.T
    point, best, count = start, objective(start), len(start)
    for move in moves:
        trial = np.clip(point + move, low, high)
        if (trial != point).any() and (rate := objective(trial)) < best - _LEAST_GAIN:
            point, best = trial, rate
    # Off the axes, which are often symmetric.
    tilt = np.eye(count) + 0.2 * np.sin(3 * np.arange(count)[:, None] + 7 * np.arange(count) + 1)
    for size in sizes:
        options = {
            "maxfev": evaluations * count,
            "xatol": 1e-9,
            "fatol": 1e-10,
            "initial_simplex": point + np.vstack([np.zeros(count), tilt * size]),
        }
        # Not by SciPy's bounds, which flatten a simplex at the box's side for good.
        end = minimize(
            lambda x: objective(np.clip(x, low, high)), point, method="Nelder-Mead", options=options
        )
        if end.fun < best - _LEAST_GAIN:
            point, best = np.clip(end.x, low, high), float(end.fun)
    return point
