"""Central differences of gradients, and the length of their move."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_nested.linalg.graph import graph_nodes
from lightning_nested.linalg.vectors import Vector, double_dot, norm, scale_

_RUNG = 4.0  # ratio of successive lengths
_RUNGS = 12  # at most, in one direction: lengths a factor of 10⁷ away
_ENOUGH = 1e-3  # relative; better products change no hypergradient that matters


def difference_length(params: Vector, loss: Tensor | None = None) -> float:
    """Return the first guess of the length of a move: half the cube root of :func:`coarsest_epsilon`.

    It is a length, whatever ‖w‖ is: networks of very different ‖w‖ have their least error between 0.001 and 0.01 in
    float32.
    """
    return float(coarsest_epsilon(params, loss) ** (1 / 3)) / 2


def coarsest_epsilon(params: Vector, loss: Tensor | None = None) -> float:
    """Return the machine epsilon of the coarsest dtype among the parameters and the operations of the loss.

    Under ``torch.autocast`` rounding is the narrow dtype's, whatever the parameters are kept in.
    """
    dtypes = {p.dtype for p in params}
    for node in graph_nodes([loss]):
        dtypes.update(meta.dtype for meta in node._input_metadata)
    return float(max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point))


def central_difference(function: Callable[[], Vector], params: Vector, v: Vector, length: float) -> Vector:
    """Derivative of ``function`` along v at the parameters' current values, moving them by ``length``."""
    size = float(norm(v))
    if size == 0.0:
        return tuple(torch.zeros_like(a) for a in function())
    epsilon = length / size
    forward, backward = (moved(function, params, v, move) for move in (epsilon, -epsilon))
    return tuple((a - b) / (2 * epsilon) for a, b in zip(forward, backward, strict=True))


def moved(function: Callable[[], Vector], params: Vector, v: Vector, epsilon: float) -> Vector:
    """Return ``function()`` at w + εv; the parameters move through ``.data``, so graphs that hold them stay valid."""
    home = [p.data for p in params]
    try:
        for p, here, direction in zip(params, home, v, strict=True):
            p.data = here.add(direction.to(here.dtype), alpha=epsilon)
        return function()
    finally:
        for p, here in zip(params, home, strict=True):
            p.data = here


def calibrated_length(function: Callable[[], Vector], params: Vector, v: Vector, start: float) -> float:
    """Return a length at which truncation and rounding of a central difference along v nearly balance.

    The error of a difference D(h) is T·h² + R/h, so ‖D(h) − D(4h)‖ has one valley over log h. Lengths 4 apart are tried
    from ``start`` towards it; where none serves, ``start`` is returned. Six gradients where products are right to 0.001
    at once, else two more for each length.

    Args:
        function: Returns the gradient at the parameters' current values; noise and statistics frozen.
        params: Parameters that are moved.
        v: Direction, of any length.
        start: First length.
    """
    size = float(norm(v))
    if size == 0.0 or not math.isfinite(size):
        return start
    unit = scale_(tuple(a.clone() for a in v), 1.0 / size)
    ladder = _Ladder(lambda length: central_difference(function, params, unit, length), start)
    shorter, longer = ladder.disagreement(-1), ladder.disagreement(0)
    rung, best = (-1, shorter) if shorter <= longer else (0, longer)
    if best > _ENOUGH:
        # Where both lengths are useless: beyond the valley gradients are far away, and D keeps its direction.
        useless = min(shorter, longer) > 0.5
        down = ladder.cosine(0) > 0.3 if useless else shorter <= longer
        step, rung = (-1, -1) if down else (1, 0)
        best, here = ladder.disagreement(rung), rung
        while abs(here) < _RUNGS and best > _ENOUGH:
            here += step
            found = ladder.disagreement(here)
            if found < best:
                rung, best = here, found
            elif best <= 0.5:
                break
    return start * _RUNG ** (rung + 0.5) if best < 0.5 else start


class _Ladder:
    """Differences D at lengths that are 4 apart: rung k has the length ``start``·4ᵏ."""

    def __init__(self, difference: Callable[[float], Vector], start: float) -> None:
        self._difference, self._start = difference, start
        self._found: dict[int, Vector] = {}

    def at(self, rung: int) -> Vector:
        if rung not in self._found:
            # Only neighbours are compared.
            self._found = {k: d for k, d in self._found.items() if abs(k - rung) <= 1}
            self._found[rung] = self._difference(self._start * _RUNG**rung)
        return self._found[rung]

    def disagreement(self, rung: int) -> float:
        """Return ‖D − D′‖ of a rung and the next one, relative to the longer of both; 1 where it is unknown."""
        here, above = self.at(rung), self.at(rung + 1)
        size = max(float(norm(here)), float(norm(above)))
        if size == 0.0:
            return 1.0
        found = float(norm(tuple(a - b for a, b in zip(here, above, strict=True)))) / size
        return found if math.isfinite(found) else 1.0

    def cosine(self, rung: int) -> float:
        """Return the cosine between D of a rung and of the next one; 1 where one is not finite."""
        here, above = self.at(rung), self.at(rung + 1)
        found = float(double_dot(here, above)) / max(float(norm(here)) * float(norm(above)), 1e-300)
        return found if math.isfinite(found) else 1.0
