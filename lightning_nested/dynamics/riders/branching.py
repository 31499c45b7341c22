"""Where to branch: start points from which small differences grow most, by gradient ascent through the training.

Lorraine, Vicol, Parker-Holder, Kachman, Metz & Foerster (2022), arXiv 2112.14570.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_nested.dynamics.frames import from_rows, to_rows
from lightning_nested.dynamics.maps import recorded
from lightning_nested.dynamics.update_map import UpdateMap
from lightning_nested.linalg.vectors import Vector

_OBJECTIVES = ("max", "min", "sum", "positive")
_SCREENED = 1024  # candidates at a time: states and frames of more leave the cache


@dataclass(frozen=True, kw_only=True)
class Branching:
    """How a branching point is found: gradient ascent of finite-time Lyapunov exponents on the start point.

    The exponents over a horizon of H steps are λᵢ = (1/H) log σᵢ(J_{H−1}…J₀), with σᵢ the singular values of the
    product of Jacobians restricted to perturbations of the parameters at the start. They are differentiated through
    all H steps. (Toy code of the paper averages log dᵀJᵀJd without the ½: twice these.)

    Attributes:
        objective: ``"max"`` (the first), ``"min"`` (the n-th), ``"sum"`` of the first n, or ``"positive"``, the sum of
            those of the first n that are positive.
        num_exponents: n.
        horizon: H.
        candidates: Places that are compared before the ascent, which begins from those with the largest objective:
            the start itself, and others at a standard normal distance from it. The objective has many maxima.
        spread: Standard deviation of that distance.
        points: Branching points of a start: the ascent begins from so many of the candidates. A large exponent says
            that runs part there, not that they part for good, so the best one need not lead to different solutions.
        ascent_steps: Steps of Adam on the start point.
        ascent_rate: Its rate.
        segment: Steps between checkpoints, whose inside is computed again in the backward pass; None: √H, the least
            memory for one more forward.
    """

    objective: str = "max"
    num_exponents: int = 1  # n
    horizon: int = 20  # H
    candidates: int = 1
    spread: float = 1.0
    points: int = 1
    ascent_steps: int = 40
    ascent_rate: float = 0.1
    segment: int | None = None

    def __post_init__(self) -> None:
        if self.objective not in _OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(_OBJECTIVES)}. Got {self.objective!r}.")
        for name in ("num_exponents", "horizon", "candidates", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Got {getattr(self, name)}.")
        if self.points > self.candidates:
            raise ValueError(
                f"points must be at most candidates, from which they begin. Got {self.points} and {self.candidates}."
            )
        if (
            self.ascent_steps < 0
            or not self.ascent_rate > 0
            or (self.segment is not None and self.segment < 1)
        ):
            raise ValueError(
                "ascent_steps must be non-negative, ascent_rate positive and segment at least 1. "
                f"Got {self.ascent_steps}, {self.ascent_rate} and {self.segment}."
            )

    def value(self, exponents: Tensor) -> Tensor:
        """The objective of exponents (..., n), largest first."""
        first = exponents[..., : self.num_exponents]
        if self.objective == "max":
            return first[..., 0]
        if self.objective == "min":
            return first[..., -1]
        return (first if self.objective == "sum" else first.clamp_min(0)).sum(-1)


class FiniteTime:
    """Finite-time exponents of a training map on a batch of start points, differentiable in them.

    Args:
        training: The map; its operations are recorded once for this batch size.
        starts: (batch, *shape) per parameter.
        branching: Horizon, number of exponents, checkpoints.

    Raises:
        MemoryError: The states and frames of the checkpoints would not fit into memory.
    """

    def __init__(self, training: UpdateMap, starts: Vector, branching: Branching) -> None:
        self._training, self._branching = training, branching
        states = torch.vmap(lambda *p: training.start(p))(*starts)
        coordinates = training.coordinates(states)
        self._like, self._batch = coordinates, len(starts[0])
        self.num_parameters = sum(p[0].numel() for p in starts)
        total = sum(a[0].numel() for a in coordinates)
        if branching.num_exponents > self.num_parameters:
            raise ValueError(
                "num_exponents must be at most the number of parameters. "
                f"Got {branching.num_exponents} and {self.num_parameters}."
            )
        size = branching.segment if branching.segment is not None else math.isqrt(branching.horizon)
        count = -(-branching.horizon // size)
        _check_memory(count * self._batch * self.num_parameters * total * starts[0].element_size())
        self._segments = [min(size, branching.horizon - i * size) for i in range(count)]
        rows = torch.eye(self.num_parameters, total, dtype=starts[0].dtype, device=starts[0].device)
        self._frame = from_rows(rows.expand(self._batch, -1, -1), coordinates, batch_dims=1)
        self._push = recorded(training.push_batch, states, self._frame)

    def jacobian(self, starts: Vector) -> Tensor:
        """∂(state after H steps)/∂(parameters at the start), transposed: (batch, parameters, coordinates)."""
        state = torch.vmap(lambda *p: self._training.start(p))(*starts)
        frame = self._frame
        for steps in self._segments:
            # Transforms that could not be recorded do not go through a checkpoint.
            if isinstance(self._push, torch.fx.GraphModule) and any(a.requires_grad for a in state):
                state, frame = checkpoint(self._run, steps, state, frame, use_reentrant=False)
            else:
                state, frame = self._run(steps, state, frame)
        return to_rows(frame, batch_dims=1)

    def _run(self, steps: int, state: Vector, frame: Vector) -> tuple[Vector, Vector]:
        for _ in range(steps):
            state, frame = self._push(state, frame)
        return tuple(state), tuple(frame)

    def exponents(self, starts: Vector) -> Tensor:
        """(batch, n), largest first; NaN where training leaves the finite numbers within the horizon."""
        jacobian, lost = _without_lost(self.jacobian(starts))
        values = torch.linalg.svdvals(jacobian)[:, : self._branching.num_exponents]
        exponents: Tensor = values.log() / self._branching.horizon
        return torch.where(lost.unsqueeze(1), math.nan, exponents)

    def directions(self, starts: Vector) -> tuple[Tensor, Tensor]:
        """Exponents, and the unit perturbations of the parameters that separate most: (batch, n, parameters)."""
        with torch.no_grad():
            jacobian, lost = _without_lost(self.jacobian(starts))
            left, values, _ = torch.linalg.svd(jacobian, full_matrices=False)
        n = self._branching.num_exponents
        directions = left.mT
        # A direction and its negative are the same branch pair; fix which one is called +.
        largest = directions.abs().argmax(-1, keepdim=True)
        directions = directions * directions.gather(-1, largest).sign()
        exponents = values[:, :n].log() / self._branching.horizon
        return torch.where(lost.unsqueeze(1), math.nan, exponents), directions

    def ascend(self, starts: Vector) -> tuple[Vector, Tensor]:
        """Start points moved uphill, and the objective at every step (steps + 1, batch).

        A start whose objective stops being finite keeps the last place where it was.
        """
        branching = self._branching
        points = [p.detach().clone().requires_grad_(True) for p in starts]
        optimizer = torch.optim.Adam(points, lr=branching.ascent_rate)
        history: list[Tensor] = []
        best = [p.detach().clone() for p in points]
        top = torch.full((self._batch,), -math.inf, dtype=points[0].dtype, device=points[0].device)
        for step in range(branching.ascent_steps + 1):
            last = step == branching.ascent_steps
            with torch.set_grad_enabled(not last):
                value = branching.value(self.exponents(tuple(points)))
            history.append(value.detach())
            # Adam overshoots: what counts is the best place on its way.
            better = value.detach() > top
            top = torch.where(better, value.detach(), top)
            for b, p in zip(best, points, strict=True):
                mask = better.view(-1, *[1] * (p.ndim - 1))
                b.copy_(torch.where(mask, p.detach(), b))
            if last:
                break
            optimizer.zero_grad()
            (-torch.where(torch.isfinite(value), value, 0.0).sum()).backward()  # type: ignore[no-untyped-call]
            for p in points:
                assert p.grad is not None
                p.grad.nan_to_num_(0.0, 0.0, 0.0)
            optimizer.step()
        return tuple(best), torch.stack(history)


def screen(training: UpdateMap, starts: Vector, branching: Branching) -> Vector:
    """For each start the ``points`` candidates around it with the largest objective, best first.

    Args:
        training: The map.
        starts: (batch, *shape) per parameter.
        branching: Candidates, spread and points. The draws are the same for every start.

    Returns:
        (batch · points, *shape) per parameter, all points of the first start first.
    """
    if branching.candidates == 1:
        return starts
    count, kept = branching.candidates, branching.points
    generator = torch.Generator().manual_seed(0)
    moved = []
    for p in starts:
        draw = torch.randn(count, *p.shape[1:], generator=generator, dtype=torch.float64).to(p)
        draw[0] = 0.0  # the start itself
        moved.append((p.unsqueeze(1) + branching.spread * draw).flatten(0, 1))
    total = len(moved[0])
    size = min(total, _SCREENED)
    finite, values = FiniteTime(training, tuple(m[:size] for m in moved), branching), []
    with torch.no_grad():
        for first in range(0, total, size):
            first = min(first, total - size)  # the operations are recorded for one size
            values.append(
                (first, branching.value(finite.exponents(tuple(m[first : first + size] for m in moved))))
            )
    value = torch.full((total,), -math.inf, dtype=moved[0].dtype, device=moved[0].device)
    for first, found in values:
        value[first : first + size] = torch.where(torch.isfinite(found), found, -math.inf)
    best = value.view(-1, count).topk(kept, dim=1).indices
    rows = (best + count * torch.arange(len(best), device=best.device).unsqueeze(1)).flatten()
    return tuple(m[rows] for m in moved)


def _without_lost(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """With ones in place of those that are not finite, which no decomposition takes; and which they are."""
    lost = ~torch.isfinite(jacobian).flatten(1).all(1)
    return torch.where(lost[:, None, None], 1.0, jacobian), lost


def _check_memory(needed: int) -> None:
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise MemoryError(
            f"The checkpoints of this horizon need {needed / 2**30:.1f} GiB. Got a machine of "
            f"{available / 2**30:.1f} GiB; shorten horizon, lengthen segment, or ride fewer starts at a time "
            "(batch_size of the executor)."
        )
