"""Search for branching points, where small differences grow most, by gradient ascent through the training.

Lorraine, Vicol, Parker-Holder, Kachman, Metz & Foerster (2022), arXiv 2112.14570.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.dynamics.checks import require_memory
from lightning_nested.dynamics.frames import from_rows, to_rows
from lightning_nested.dynamics.maps import recorded
from lightning_nested.dynamics.update_map import UpdateMap
from lightning_nested.linalg.vectors import Vector

_SCREENED = 1024  # candidates at a time: states and frames of more leave the cache


@checked
@dataclass(frozen=True, kw_only=True)
class Branching:
    """Options of the search for branching points: gradient ascent of finite-time Lyapunov exponents on a start point.

    The exponents over a horizon of H steps are λᵢ = (1/H) log σᵢ(J_{H−1}…J₀), with σᵢ the singular values of the
    product of Jacobians restricted to perturbations of the parameters at the start. They are differentiated through
    all H steps. (The paper's toy code averages log dᵀJᵀJd without the ½, which gives twice these.)

    Attributes:
        objective: ``"max"`` (the first), ``"min"`` (the n-th), ``"sum"`` of the first n, or ``"positive"``, the sum of
            those of the first n that are positive.
        num_exponents: n.
        horizon: H.
        candidates: Number of places that are compared before the ascent, because the objective has many maxima: the
            start itself, and others at a normal distance from it.
        spread: Standard deviation of that distance.
        points: Number of branching points of a start: the ascent begins from that many of the best candidates. A large
            exponent says that runs part there, not that they part for good, so several are worth trying.
        ascent_steps: Steps of Adam on the start point.
        ascent_rate: Learning rate of Adam.
        segment: Steps between checkpoints, recomputed in the backward pass; None: √H, the least memory for one more
            forward pass.
    """

    objective: Literal["max", "min", "sum", "positive"] = "max"
    num_exponents: int = 1  # n
    horizon: int = 20  # H
    candidates: int = 1
    spread: float = 1.0
    points: int = 1
    ascent_steps: int = 40
    ascent_rate: float = 0.1
    segment: int | None = None

    def __post_init__(self) -> None:
        at_least(1, num_exponents=self.num_exponents, horizon=self.horizon)
        at_least(1, candidates=self.candidates, points=self.points, segment=self.segment)
        if self.points > self.candidates:
            got = f"Got {self.points} and {self.candidates}."
            raise ValueError(f"points must be at most candidates, from which they begin. {got}")
        at_least(0, ascent_steps=self.ascent_steps, spread=self.spread)
        positive(ascent_rate=self.ascent_rate)

    def value(self, exponents: Tensor) -> Tensor:
        """Evaluate the objective for exponents (..., n), largest first."""
        first = exponents[..., : self.num_exponents]
        if self.objective == "max":
            return first[..., 0]
        if self.objective == "min":
            return first[..., -1]
        return (first if self.objective == "sum" else first.clamp_min(0)).sum(-1)


class FiniteTime:
    """Finite-time exponents of a training map on a batch of start points, differentiable in them.

    Starts are (batch, *shape) per parameter; the operations of the map are recorded once for this batch size.

    Raises:
        MemoryError: The states and frames of the checkpoints would not fit into memory.
    """

    def __init__(self, training: UpdateMap, starts: Vector, branching: Branching) -> None:
        self._training, self._branching = training, branching
        states = self._states(starts)
        coordinates = training.coordinates(states)
        self._batch = len(starts[0])
        self.num_parameters = sum(p[0].numel() for p in starts)
        total = sum(a[0].numel() for a in coordinates)
        if branching.num_exponents > self.num_parameters:
            raise ValueError(
                "num_exponents must be at most the number of parameters. "
                f"Got {branching.num_exponents} and {self.num_parameters}."
            )
        size = branching.segment if branching.segment is not None else math.isqrt(branching.horizon)
        count = -(-branching.horizon // size)
        require_memory(
            count * self._batch * self.num_parameters * total * starts[0].element_size(),
            "The checkpoints of this horizon need",
            "shorten horizon, lengthen segment, or ride fewer starts at a time (batch_size of the executor)",
        )
        self._segments = [min(size, branching.horizon - i * size) for i in range(count)]
        rows = torch.eye(self.num_parameters, total, dtype=starts[0].dtype, device=starts[0].device)
        self._frame = from_rows(rows.expand(self._batch, -1, -1), coordinates, batch_dims=1)
        self._push = recorded(training.push_batch, states, self._frame)

    def _states(self, starts: Vector) -> Vector:
        states: Vector = torch.vmap(lambda *p: self._training.start(p))(*starts)
        return states

    def _jacobian(self, starts: Vector) -> tuple[Tensor, Tensor]:
        """Return ∂(state after H steps)/∂(parameters at the start), transposed, and which are not finite.

        Shapes are (batch, parameters, coordinates) and (batch,). No decomposition takes numbers that are not finite:
        ones replace them.
        """
        state, frame = self._states(starts), self._frame
        for steps in self._segments:
            # Transforms that could not be recorded do not go through a checkpoint.
            if isinstance(self._push, torch.fx.GraphModule) and any(a.requires_grad for a in state):
                state, frame = checkpoint(self._run, steps, state, frame, use_reentrant=False)
            else:
                state, frame = self._run(steps, state, frame)
        jacobian = to_rows(frame, batch_dims=1)
        lost = ~torch.isfinite(jacobian).flatten(1).all(1)
        return torch.where(lost[:, None, None], 1.0, jacobian), lost

    def _run(self, steps: int, state: Vector, frame: Vector) -> tuple[Vector, Vector]:
        for _ in range(steps):
            state, frame = self._push(state, frame)
        return tuple(state), tuple(frame)

    def exponents(self, starts: Vector) -> Tensor:
        """Return exponents (batch, n), largest first; NaN where training does not stay finite within the horizon."""
        jacobian, lost = self._jacobian(starts)
        return self._logarithms(torch.linalg.svdvals(jacobian), lost)

    def _logarithms(self, values: Tensor, lost: Tensor) -> Tensor:
        exponents = values[:, : self._branching.num_exponents].log() / self._branching.horizon
        return torch.where(lost.unsqueeze(1), math.nan, exponents)

    def directions(self, starts: Vector) -> tuple[Tensor, Tensor]:
        """Return exponents, and the unit perturbations of parameters that separate most: (batch, n, parameters)."""
        with torch.no_grad():
            jacobian, lost = self._jacobian(starts)
            left, values, _ = torch.linalg.svd(jacobian, full_matrices=False)
        directions = left.mT
        # A direction and its negative are the same branch pair; fix which one is called +.
        largest = directions.abs().argmax(-1, keepdim=True)
        directions = directions * directions.gather(-1, largest).sign()
        return self._logarithms(values, lost), directions

    def ascend(self, starts: Vector) -> tuple[Vector, Tensor]:
        """Return start points moved uphill, and the objective at every step (steps + 1, batch).

        A start whose objective stops being finite keeps the best place before that.
        """
        branching = self._branching
        points = [p.detach().clone().requires_grad_(True) for p in starts]
        optimizer = torch.optim.Adam(points, lr=branching.ascent_rate)
        history: list[Tensor] = []
        best = [p.detach().clone() for p in points]
        top = points[0].detach().new_full((self._batch,), -math.inf)
        for step in range(branching.ascent_steps + 1):
            last = step == branching.ascent_steps
            with torch.set_grad_enabled(not last):
                value = branching.value(self.exponents(tuple(points)))
            history.append(value.detach())
            # Adam overshoots: keep the best place on its way.
            better = history[-1] > top
            top = torch.where(better, history[-1], top)
            for b, p in zip(best, points, strict=True):
                b[better] = p.detach()[better]
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
    """Return for each start the ``points`` candidates around it with the largest objective, best first.

    Starts are (batch, *shape) per parameter, results (batch · points, *shape), all points of the first start first.
    The draws are the same for every start.
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
    finite = FiniteTime(training, tuple(m[:size] for m in moved), branching)
    value = moved[0].new_empty(total)
    with torch.no_grad():
        for first in range(0, total, size):
            first = min(first, total - size)  # the operations are recorded for one size
            rows = slice(first, first + size)
            found = branching.value(finite.exponents(tuple(m[rows] for m in moved)))
            value[rows] = torch.where(torch.isfinite(found), found, -math.inf)
    best = value.view(-1, count).topk(kept, dim=1).indices
    chosen = (best + count * torch.arange(len(best), device=best.device).unsqueeze(1)).flatten()
    return tuple(m[chosen] for m in moved)
