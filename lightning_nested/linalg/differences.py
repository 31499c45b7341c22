"""Differences of gradients, one-sided and central, and the length of their move."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nested.linalg.graph import graph_nodes
from lightning_nested.linalg.shards import in_shards, parts
from lightning_nested.linalg.vectors import Vector, add_, clone, double_dot, follow_, norm, scale_, slope_

_RUNG = 4.0  # ratio of successive lengths
_RUNGS = 12  # at most, in one direction: lengths a factor of 10⁷ away
_ENOUGH = 1e-3  # relative; better products change no hypergradient that matters


def difference_length(params: Vector, loss: Tensor | None = None) -> float:
    """Return the first guess of the length of a central difference's move: :func:`first_length` of the dtypes."""
    return first_length(coarsest_epsilon(params, loss), sides=2)


def first_length(rounding: float, *, sides: int) -> float:
    """Return the first guess of the length of a move: 3·√eps for one-sided differences, ∛eps/2 for central ones.

    Both are lengths, whatever ‖w‖ is: in float32 networks of very different ‖w‖ have the least error of one-sided
    differences between 0.0001 and 0.01, and that of central ones between 0.001 and 0.03.
    """
    return 3.0 * math.sqrt(rounding) if sides == 1 else rounding ** (1 / 3) / 2


def coarsest_epsilon(params: Vector, loss: Tensor | None = None) -> float:
    """Return the machine epsilon of the coarsest dtype among the parameters and the operations of the loss.

    Under ``torch.autocast`` rounding is the narrow dtype's, whatever the parameters are kept in.
    """
    dtypes = {p.dtype for p in params}
    for node in graph_nodes([loss]):
        dtypes.update(meta.dtype for meta in node._input_metadata)
    return float(max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point))


def central_difference(
    function: Callable[[], Vector], params: Vector, v: Vector, length: float, room: list[Tensor] | None = None
) -> Vector:
    """Derivative of ``function`` along v at the parameters' current values, moving them by ``length``.

    ``room``: see :func:`moved`.
    """
    size = float(norm(v))
    if size == 0.0:
        return tuple(torch.zeros_like(a) for a in function())
    epsilon = length / size
    forward, backward = (moved(function, params, v, move, room) for move in (epsilon, -epsilon))
    return tuple((a - b).div_(2 * epsilon) for a, b in zip(forward, backward, strict=True))


class OneSided:
    """Derivatives of a function along one direction after another, by one evaluation each.

    New memory costs as much as the arithmetic, so it is kept between evaluations. If ``rounded``, differences are
    divided by a power of two: that is exact, and one multiple of g(w) serves many of them. The length of a move is then
    between 1/√2 and √2 times the one asked for.

    Args:
        function: Returns g at the parameters' current values, in tensors that may be overwritten.
        params: Parameters that are moved.
        here: g(w).
        rounded: See above; False: moves are as long as asked for.
    """

    def __init__(
        self, function: Callable[[], Vector], params: Vector, here: Vector, *, rounded: bool = True
    ) -> None:
        self._function, self._params, self._here, self._rounded = function, params, here, rounded
        self._room: list[Tensor] = []
        # −g(w)·factor; fp16 has no range for it.
        self._factor, self._scaled = 0.0, here
        self._wide = all(a.element_size() >= 4 for a in here)

    def __call__(self, v: Vector, length: float) -> Vector:
        """Return (g(w + εv) − g(w))/ε with ε‖v‖ about ``length``."""
        size = float(norm(v))
        if size == 0.0:
            return tuple(torch.zeros_like(a) for a in self._here)
        factor = _power_of_two(size / length) if self._rounded else size / length
        if factor != self._factor:
            self._factor, self._scaled = 0.0, ()  # freed while the function needs memory
        ahead = moved(self._function, self._params, v, 1.0 / factor, self._room)
        if not self._wide:
            return slope_(ahead, self._here, factor)
        if factor != self._factor:
            self._factor, self._scaled = factor, tuple(a * -factor for a in self._here)
        return follow_(ahead, factor, self._scaled)


def _power_of_two(number: float) -> float:
    """Return the nearest power of two; the number itself where there is none."""
    if not 1e-300 < number < 1e300:
        return number
    return math.ldexp(1.0, round(math.log2(number)))


def moved(
    function: Callable[[], Vector],
    params: Vector,
    v: Vector,
    epsilon: float,
    room: list[Tensor] | None = None,
) -> Vector:
    """Return ``function()`` at w + εv; the parameters move through ``.data``, so graphs that hold them stay valid.

    Shards move in place, which is where they are gathered from: who evaluates them must have them gathered again.

    Args:
        function: See above.
        params: w.
        v: Direction.
        epsilon: ε.
        room: Memory for w + εv, filled by the first call and kept for the next; None: new memory.
    """
    if in_shards(params):
        return _moved_shards(function, params, v, epsilon)
    home = [p.data for p in params]
    places: Sequence[Tensor | None] = room or [None] * len(home)
    try:
        for p, here, direction, place in zip(params, home, v, places, strict=True):
            p.data = torch.add(here, direction.detach().to(here.dtype), alpha=epsilon, out=place)
        if room == []:
            room.extend(p.data for p in params)
        # Inside autocast, forward passes reuse casts of the weights that an earlier one made.
        torch.clear_autocast_cache()
        return function() if room is None else _apart(function(), room)
    finally:
        for p, here in zip(params, home, strict=True):
            p.data = here
        torch.clear_autocast_cache()


def _apart(result: Vector, room: Sequence[Tensor]) -> Vector:
    """Return tensors that share no memory with ``room``: a function may hand back what it was evaluated at."""
    taken = {a.untyped_storage().data_ptr() for a in room}
    return tuple(
        a.detach().clone() if a.untyped_storage().data_ptr() in taken else a.detach() for a in result
    )


@torch.no_grad()
def _moved_shards(function: Callable[[], Vector], params: Vector, v: Vector, epsilon: float) -> Vector:
    here = parts(params)
    home = [p.clone() for p in here]
    try:
        for p, direction in zip(here, parts(v), strict=True):
            p.add_(direction.to(p.dtype), alpha=epsilon)
        torch.clear_autocast_cache()
        with torch.enable_grad():
            return function()
    finally:
        for p, before in zip(here, home, strict=True):
            p.copy_(before)
        torch.clear_autocast_cache()


def calibrated_length(function: Callable[[], Vector], params: Vector, v: Vector, start: float) -> float:
    """Return the length of :func:`calibrate` for central differences, whose other results are not needed."""
    return calibrate(function, params, v, start).length


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibrated:
    """A length of moves, and what was seen on the way to it."""

    length: float
    error: float = (
        math.nan
    )  # ‖D − D′‖ of the best two lengths, relative: about the error of a product; 1: useless
    product: Vector | None = None  # extrapolated from these two, as good as one more


def calibrate(
    function: Callable[[], Vector],
    params: Vector,
    v: Vector,
    start: float,
    one_sided: OneSided | None = None,
) -> Calibrated:
    """Find a length at which truncation and rounding of a difference along v nearly balance.

    The error of a difference D(h) is T·hᵖ + R/h, p = 2 for a central and 1 for a one-sided one, so ‖D(h) − D(4h)‖ has
    one valley over log h. Lengths 4 apart are tried from ``start`` towards it; where none serves it is ``start``.
    Three differences where products are right to 0.001 at once, else one more for each length.

    Args:
        function: Returns the gradient at the parameters' current values; noise and statistics frozen.
        params: Parameters that are moved.
        v: Direction, of any length.
        start: First length.
        one_sided: Differences of the function; None: central ones.
    """
    size = float(norm(v))
    if size == 0.0 or not math.isfinite(size):
        return Calibrated(length=start)
    unit = scale_(tuple(a.clone() for a in v), 1.0 / size)

    room: list[Tensor] = []

    def difference(length: float) -> Vector:
        if one_sided is None:
            return central_difference(function, params, unit, length, room)
        return one_sided(unit, length)

    ladder = _Ladder(difference, start, _RUNG ** (2 if one_sided is None else 1))
    shorter, product = ladder.disagreement(-1), ladder.extrapolated(-1)
    longer = ladder.disagreement(0)
    rung, best = (-1, shorter) if shorter <= longer else (0, longer)
    product = product if rung else ladder.extrapolated(0)
    if best > _ENOUGH:
        # Where both lengths are useless: beyond the valley gradients are far away, and D keeps its direction. One-sided
        # differences keep some of it in rounding too, that of g(w), and nearly all of their length is useless then.
        useless, kept = (0.5, 0.3) if one_sided is None else (0.85, 0.65)
        down = ladder.cosine(0) > kept if min(shorter, longer) > useless else shorter <= longer
        step, rung = (-1, -1) if down else (1, 0)
        best, here_rung = ladder.disagreement(rung), rung
        while abs(here_rung) < _RUNGS and best > _ENOUGH:
            here_rung += step
            found = ladder.disagreement(here_rung)
            if found < best:
                rung, best, product = here_rung, found, ladder.extrapolated(here_rung)
            elif best <= 0.5:
                break
    if not best < 0.5:
        return Calibrated(length=start, error=1.0)
    return Calibrated(length=start * _RUNG ** (rung + 0.5), error=best, product=scale_(product, size))


class _Ladder:
    """Differences D at lengths that are 4 apart: rung k has the length ``start``·4ᵏ, and 4ᵖ times the truncation."""

    def __init__(self, difference: Callable[[float], Vector], start: float, power: float) -> None:
        self._difference, self._start, self._power = difference, start, power
        self._found: dict[int, Vector] = {}

    def at(self, rung: int) -> Vector:
        if rung not in self._found:
            # Only neighbours are compared.
            self._found = {k: d for k, d in self._found.items() if abs(k - rung) <= 1}
            self._found[rung] = self._difference(self._start * _RUNG**rung)
        return self._found[rung]

    def extrapolated(self, rung: int) -> Vector:
        """Return (4ᵖD − D′)/(4ᵖ − 1) of a rung and the next one: without the first term of the truncation."""
        factor = 1.0 / (self._power - 1.0)
        return add_(scale_(clone(self.at(rung)), 1.0 + factor), self.at(rung + 1), alpha=-factor)

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
