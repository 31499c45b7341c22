"""Generalized Ridge Rider: branch where training separates, and ride to the different solutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.arguments import at_least, checked
from lightning_nested.dynamics.maps import recorded
from lightning_nested.dynamics.riders.branching import Branching, FiniteTime, screen
from lightning_nested.dynamics.riders.executors import Executor, InProcess
from lightning_nested.dynamics.riders.tree import PATH_POINTS, PATH_SIZE, Branch, RideTree
from lightning_nested.dynamics.update_map import UpdateMap, update_map
from lightning_nested.linalg.vectors import Vector, flatten, unflatten

MakeOptimizer: TypeAlias = Callable[[list[Tensor]], Optimizer]
Behaviour: TypeAlias = Callable[[tuple[Tensor, ...]], Tensor]
Progress: TypeAlias = Callable[[str, int, int], None]
Job: TypeAlias = tuple[str, Tensor]  # the name of a place, and its parameters, flat


@checked
@dataclass(frozen=True, kw_only=True)
class GeneralizedRidgeRider:
    """Finds different solutions of one training problem, of a loss or of a game.

    1. From each start, or the best candidates around it, ascend an objective of the top Lyapunov exponents to
       branching points.
    2. Step ± along the directions that training separates most, by each of ``distances``.
    3. Ride: run the plain optimizer from each of these places.
    4. Keep the ends that behave differently, ranked by their losses. With ``depth`` > 1, branch again from every end.

    Everything is a deterministic function of the starts. The Ridge Rider of one loss at a saddle is
    :class:`RidgeRider`.

    Attributes:
        branching: Objective and its ascent.
        num_directions: Number of directions, the most separating ones, that are branched along.
        distances: Lengths of the step to either side; more than one also finds the solutions behind the next ones.
        ride_steps: Steps of the optimizer from each branch.
        depth: Levels of branching.
        tolerance: Difference of behaviours up to which two ends are one solution.
        executor: Runner of the branches: this process, several ones, or a cluster.

    Lorraine, Vicol, Parker-Holder, Kachman, Metz & Foerster (2022), arXiv 2112.14570.

    >>> from functools import partial
    >>> from lightning_nested.games import SmallIPD
    >>> rider = GeneralizedRidgeRider(branching=Branching(horizon=5, ascent_steps=2), ride_steps=200)
    >>> tree = rider.ride(SmallIPD().losses, [(torch.zeros(1).double(), torch.zeros(1).double())],
    ...                   partial(torch.optim.SGD, lr=4.0))
    >>> [[round(x, 1) for x in s.losses] for s in tree.solutions()]  # cooperation and defection
    [[1.0, 1.0], [2.0, 2.0]]
    """

    branching: Branching = field(default_factory=Branching)
    num_directions: int = 1
    distances: tuple[float, ...] = (1.0,)
    ride_steps: int = 1000
    depth: int = 1
    tolerance: float = 0.02
    executor: Executor = field(default_factory=InProcess)

    def __post_init__(self) -> None:
        at_least(1, num_directions=self.num_directions, ride_steps=self.ride_steps, depth=self.depth)
        at_least(0, tolerance=self.tolerance)
        if not self.distances or min(self.distances) <= 0:
            raise ValueError(f"distances must be positive, at least one. Got {self.distances}.")

    def ride(
        self,
        losses: Callable[..., Any],
        starts: Sequence[Sequence[Tensor]],
        optimizer: MakeOptimizer,
        *,
        behaviour: Behaviour | None = None,
        folder: Path | str | None = None,
        progress: Progress | None = None,
    ) -> RideTree:
        """Ride from every start.

        Args:
            losses: ``losses(players) -> tuple of scalars``, or ``loss(params) -> scalar``; a function of its argument
                alone, made of operations that ``torch.func`` differentiates.
            starts: A tuple of tensors each, the same shapes for all.
            optimizer: Function from the list of tensors to a torch optimizer that :func:`update_map` knows; in a game
                every tensor is a player. Its own state starts fresh at every branch.
            behaviour: Function from the final tensors to a tensor that tells solutions apart; default the losses.
            folder: Folder that keeps finished branches; a ride that was interrupted goes on from them.
            progress: Function that is called with a phase, the number of finished jobs, and the number of all.

        Raises:
            ValueError: Unknown optimizer, wrong number of losses, or a folder of a ride with other settings.
        """
        params = [tuple(p.detach() for p in start) for start in starts]
        self._check(params)
        crew = _Crew(rider=self, losses=losses, optimizer=optimizer, behaviour=behaviour, like=params[0])
        kept = None if folder is None else Path(folder)
        tree = RideTree(tolerance=self.tolerance, folder=kept, settings=self._settings(params, crew))
        report = progress if progress is not None else lambda *_: None
        jobs = [(str(i), flatten(p)) for i, p in enumerate(params)]
        for level in range(self.depth):
            self._run(tree, crew.find, jobs, self._points, "branching", report)
            points = [tree.branches[n] for name, _ in jobs for n in self._points(name)]
            if level == 0 and not any(p.finite for p in points):
                raise FloatingPointError(
                    f"Training must stay finite for the {self.branching.horizon} steps of the horizon. Got numbers "
                    "that are not from every start: lower the learning rate or the horizon."
                )
            rides = [r for p in points if p.finite for r in crew.branches(p)]
            self._run(tree, crew.ride, rides, lambda name: [name], "ride", report)
            ends = [tree.branches[name] for name, _ in rides]
            jobs = [(b.name, flatten(b.tensors(params[0]))) for b in ends if b.finite]
            if level + 1 == self.depth or not jobs:
                break
        return tree

    def _check(self, starts: Sequence[Vector]) -> None:
        if not starts:
            raise ValueError("There must be at least one start. Got none.")
        for i, start in enumerate(starts):
            if not all(bool(torch.isfinite(p).all()) for p in start):
                raise ValueError(f"Starts must be finite. Got a number that is not in start {i}.")
            first, own = ([tuple(p.shape) for p in s] for s in (starts[0], start))
            if first != own:
                raise ValueError(f"Starts must have the same shapes. Got {first} and, as start {i}, {own}.")
        n = sum(p.numel() for p in starts[0])
        if self.num_directions > n:
            got = f"Got {self.num_directions} and {n}."
            raise ValueError(f"num_directions must be at most the number of parameters. {got}")

    def _points(self, name: str) -> list[str]:
        """Return the names of the branching points of a start or an end, the best first."""
        first = name if name.isdigit() else f"{name}/"
        return [first, *(f"{first}.{i}" for i in range(1, self.branching.points))]

    def _run(
        self,
        tree: RideTree,
        function: Callable[[Sequence[Job]], list[Branch]],
        jobs: Sequence[Job],
        names: Callable[[str], list[str]],
        what: str,
        report: Progress,
    ) -> None:
        def left(chunk: Sequence[Job]) -> bool:
            return not all(n in tree for job in chunk for n in names(job[0]))

        # A chunk that was cut runs again whole: rounding depends on what runs together, and the end on rounding.
        chunks = [c for c in self.executor.chunks(jobs) if left(c)]
        if not chunks:
            return
        done = len(jobs) - sum(map(len, chunks))
        report(what, done, len(jobs))
        per = len(names(jobs[0][0]))
        for branches in self.executor.map(function, chunks):
            tree.add(b for b in branches if b.name not in tree)
            done += len(branches) // per
            report(what, done, len(jobs))

    def _settings(self, starts: Sequence[Vector], crew: _Crew) -> str:
        """Return all settings that decide the branches, as text; not where they run."""
        optimizer = crew.optimizer([p.clone() for p in starts[0]])
        training = update_map(optimizer, crew.losses)
        lines = {f"branching.{f.name}": getattr(self.branching, f.name) for f in fields(self.branching)}
        lines |= {n: getattr(self, n) for n in ("num_directions", "distances", "ride_steps", "depth")}
        lines |= {"optimizer": type(optimizer).__name__}
        lines |= {f"optimizer.{k}": v for k, v in optimizer.param_groups[0].items() if k != "params"}
        lines |= {"starts": [flatten(s).tolist() for s in starts]}
        # A game has no name that tells it from others; its losses at the starts do, up to rounding.
        with torch.no_grad():
            lines |= {"losses": [[f"{float(v):.6g}" for v in training.losses(s)] for s in starts]}
        return "".join(f"{key}: {value}\n" for key, value in lines.items())


@dataclass(frozen=True, kw_only=True)
class _Crew:
    """Work on branches, in a form that can be sent to another process."""

    rider: GeneralizedRidgeRider
    losses: Callable[..., Any]
    optimizer: MakeOptimizer
    behaviour: Behaviour | None
    like: Vector
    # Recorded steps by size of the batch; they stay in their process.
    recordings: dict[int, Callable[..., Any]] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recordings": {}}

    def _training(self) -> UpdateMap:
        return update_map(self.optimizer([p.clone() for p in self.like]), self.losses)

    def _stacked(self, jobs: Sequence[Job]) -> Vector:
        return tuple(torch.stack(ps) for ps in zip(*(unflatten(f, self.like) for _, f in jobs), strict=True))

    def find(self, jobs: Sequence[Job]) -> list[Branch]:
        """Find the branching points of each start, those with the largest objective first."""
        training, branching = self._training(), self.rider.branching
        starts = screen(training, self._stacked(jobs), branching)
        finite = FiniteTime(training, starts, branching)
        points, history = finite.ascend(starts)
        exponents, directions = finite.directions(points)
        top = torch.where(torch.isfinite(history), history, -math.inf).amax(0).view(len(jobs), -1)
        order = top.argsort(dim=1, descending=True, stable=True).tolist()
        found = []
        for j, (name, flat) in enumerate(jobs):
            for point_name, place in zip(self.rider._points(name), order[j], strict=True):
                i = j * branching.points + place
                point = tuple(p[i] for p in points)
                found.append(
                    Branch.from_tensors(
                        unflatten(flat, self.like),
                        point,
                        name=point_name,
                        parent=None if name.isdigit() else name,
                        losses=[float(v) for v in training.losses(point)],
                        exponents=exponents[i].tolist(),
                        directions=directions[i, : self.rider.num_directions].tolist(),
                        behaviour=history[:, i].tolist(),
                        finite=bool(torch.isfinite(exponents[i]).all()),
                    )
                )
        return found

    def branches(self, point: Branch) -> list[Job]:
        """Return the places beside a branching point, with their names."""
        flat, jobs = flatten(point.tensors(self.like)), []
        for d, direction in enumerate(torch.tensor(point.directions, dtype=flat.dtype, device=flat.device)):
            for at, distance in enumerate(self.rider.distances):
                for sign, size in (("+", distance), ("-", -distance)):
                    suffix = f"@{at}" if len(self.rider.distances) > 1 else ""
                    jobs.append((f"{point.name}{sign}{d}{suffix}", flat + size * direction))
        return jobs

    def ride(self, jobs: Sequence[Job]) -> list[Branch]:
        """Run the plain optimizer from each place."""
        training, starts = self._training(), self._stacked(jobs)
        keep = sum(p[0].numel() for p in starts) <= PATH_SIZE
        kept, path = _thinned(self.rider.ride_steps), []
        with torch.no_grad():
            state = torch.vmap(lambda *p: training.start(p))(*starts)
            if len(jobs) not in self.recordings:
                self.recordings[len(jobs)] = recorded(torch.vmap(training.step), state)
            step = self.recordings[len(jobs)]
            for t in range(self.rider.ride_steps):
                if keep and t in kept:
                    path.append(state)
                state = tuple(step(state))
        paths = [torch.cat([p.flatten(1) for p in training.parameters(s)], 1) for s in [*path, state]]
        result = []
        for i, (name, flat) in enumerate(jobs):
            end = tuple(p[i] for p in training.parameters(state))
            losses = [float(v) for v in training.losses(end)]
            result.append(
                Branch.from_tensors(
                    unflatten(flat, self.like),
                    end,
                    name=name,
                    parent=name[: max(name.rfind("+"), name.rfind("-"))],
                    losses=losses,
                    behaviour=losses if self.behaviour is None else self.behaviour(end).flatten().tolist(),
                    path=[p[i].tolist() for p in paths] if keep else [],
                )
            )
        return result


def _thinned(steps: int) -> set[int]:
    """Return the times at which a path is kept: every one at first, where runs part, and ever fewer."""
    return {0, *(round(steps ** (i / PATH_POINTS)) for i in range(PATH_POINTS))}
