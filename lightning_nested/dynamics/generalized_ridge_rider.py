"""Generalized Ridge Rider: branch where training separates, and ride to the different solutions.

Lorraine, Vicol, Parker-Holder, Kachman, Metz & Foerster (2022), arXiv 2112.14570.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.dynamics.branching import Branching, FiniteTime, screen
from lightning_nested.dynamics.executors import Executor, InProcess
from lightning_nested.dynamics.maps import recorded
from lightning_nested.dynamics.tree import Branch, RideTree
from lightning_nested.dynamics.update_map import UpdateMap, update_map
from lightning_nested.hypergradient.vectors import Vector, flatten, unflatten

MakeOptimizer: TypeAlias = Callable[[list[Tensor]], Optimizer]
Behaviour: TypeAlias = Callable[[tuple[Tensor, ...]], Tensor]
Progress: TypeAlias = Callable[[str, int, int], None]
_PATH = 60  # points of a path that are kept
_PATH_SIZE = 64  # parameters up to which paths are kept


@dataclass(frozen=True, kw_only=True)
class GeneralizedRidgeRider:
    """Finds different solutions of one training problem, of a loss or of a game.

    1. From each start, or the best candidate around it, ascend an objective of the top Lyapunov exponents to a
       branching point.
    2. Step ± along the directions that training separates most, each at every one of ``distances``.
    3. Ride: run the plain optimizer from each of these places.
    4. Keep the ends that behave differently, ranked by their losses. With ``depth`` > 1, branch again from every end.

    Everything is a deterministic function of the starts. Finished branches are kept in ``folder``, if there is one; a
    ride that was interrupted goes on from them. The Ridge Rider of one loss at a saddle is :class:`RidgeRider`.

    Attributes:
        branching: The objective and its ascent.
        num_directions: How many of the most separating directions are branched along.
        distances: Lengths of the step to either side; more than one also finds the solutions behind the next ones.
        ride_steps: Steps of the optimizer from each branch.
        depth: Levels of branching.
        tolerance: Difference of behaviours up to which two ends are one solution.
        executor: Where branches run.

    Lorraine, Vicol, Parker-Holder, Kachman, Metz & Foerster (2022), arXiv 2112.14570.

    >>> from functools import partial
    >>> from lightning_nested.games import SmallIPD
    >>> rider = GeneralizedRidgeRider(branching=Branching(horizon=10, ascent_steps=5), ride_steps=2000)
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
        for name, least in (("num_directions", 1), ("ride_steps", 1), ("depth", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}. Got {getattr(self, name)}.")
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
            optimizer: From the list of tensors to a torch optimizer that :func:`update_map` knows; in a game every
                tensor is a player. Its own state starts fresh at every branch.
            behaviour: From the final tensors to a flat tensor by which solutions are told apart; default the losses.
            folder: Where finished branches are kept.
            progress: Called with what was done, how many are done, how many there are.

        Raises:
            ValueError: Unknown optimizer, wrong number of losses, or a folder of a ride with other settings.
        """
        params = [tuple(p.detach() for p in start) for start in starts]
        if not params:
            raise ValueError("There must be at least one start. Got none.")
        crew = _Crew(rider=self, losses=losses, optimizer=optimizer, behaviour=behaviour, like=params[0])
        tree = RideTree(
            tolerance=self.tolerance,
            folder=None if folder is None else Path(folder),
            settings=self._settings(params, optimizer),
        )
        jobs = [(str(i), flatten(p)) for i, p in enumerate(params)]
        for level in range(self.depth):
            starts_left = [j for j in jobs if _point(j[0]) not in tree]
            self._run(tree, crew.find, starts_left, "branching", progress)
            rides: list[tuple[str, Tensor]] = []
            for name, _ in jobs:
                rides += crew.branches(tree.branches[_point(name)])
            self._run(tree, crew.ride, [r for r in rides if r[0] not in tree], "ride", progress)
            ends = [tree.branches[name] for name, _ in rides]
            jobs = [(b.name, flatten(b.tensors(params[0]))) for b in ends if b.finite]
            if level + 1 == self.depth or not jobs:
                break
        return tree

    def _run(
        self,
        tree: RideTree,
        function: Callable[[Sequence[tuple[str, Tensor]]], list[Branch]],
        jobs: Sequence[tuple[str, Tensor]],
        what: str,
        progress: Progress | None,
    ) -> None:
        if not jobs:
            return
        done = 0
        if progress is not None:
            progress(what, 0, len(jobs))
        for branches in self.executor.map(function, self.executor.chunks(jobs)):
            tree.add(branches)
            done += len(branches)
            if progress is not None:
                progress(what, done, len(jobs))

    def _settings(self, starts: Sequence[Vector], optimizer: MakeOptimizer) -> str:
        """What decides the branches, as text; not where they run."""
        group = optimizer([p.clone() for p in starts[0]]).param_groups[0]
        options = {key: value for key, value in group.items() if key != "params"}
        numbers = [flatten(s).tolist() for s in starts]
        return "\n".join(
            [
                f"{self.branching}",
                f"directions {self.num_directions}, distances {self.distances}, ride_steps {self.ride_steps}, "
                f"depth {self.depth}",
                f"optimizer {options}",
                f"starts {numbers}",
                "",
            ]
        )


def _point(name: str) -> str:
    """The name of the branching point found from a root or an end."""
    return name if name.isdigit() else f"{name}/"


@dataclass(frozen=True, kw_only=True)
class _Crew:
    """What a process needs to work on branches."""

    rider: GeneralizedRidgeRider
    losses: Callable[..., Any]
    optimizer: MakeOptimizer
    behaviour: Behaviour | None
    like: Vector

    def _training(self) -> UpdateMap:
        return update_map(self.optimizer([p.clone() for p in self.like]), self.losses)

    def _stacked(self, jobs: Sequence[tuple[str, Tensor]]) -> Vector:
        return tuple(torch.stack(ps) for ps in zip(*(unflatten(f, self.like) for _, f in jobs), strict=True))

    def find(self, jobs: Sequence[tuple[str, Tensor]]) -> list[Branch]:
        """A branching point for each start."""
        training = self._training()
        starts = screen(training, self._stacked(jobs), self.rider.branching)
        finite = FiniteTime(training, starts, self.rider.branching)
        points, history = finite.ascend(starts)
        exponents, _ = finite.directions(points)
        found = []
        for i, (name, flat) in enumerate(jobs):
            point = tuple(p[i] for p in points)
            found.append(
                Branch(
                    name=_point(name),
                    parent=None if name.isdigit() else name,
                    start=_lists(unflatten(flat, self.like)),
                    end=_lists(point),
                    losses=[float(v) for v in training.losses(point)],
                    exponents=exponents[i].tolist(),
                    behaviour=history[:, i].tolist(),
                    finite=bool(torch.isfinite(exponents[i]).all()),
                )
            )
        return found

    def branches(self, point: Branch) -> list[tuple[str, Tensor]]:
        """The places beside a branching point, with their names."""
        params = point.tensors(self.like)
        stacked = tuple(p.unsqueeze(0) for p in params)
        _, directions = FiniteTime(self._training(), stacked, self.rider.branching).directions(stacked)
        flat, jobs = flatten(params), []
        for d in range(min(self.rider.num_directions, directions.shape[1])):
            for at, distance in enumerate(self.rider.distances):
                for sign, size in (("+", distance), ("-", -distance)):
                    suffix = f"@{at}" if len(self.rider.distances) > 1 else ""
                    jobs.append((f"{point.name}{sign}{d}{suffix}", flat + size * directions[0, d]))
        return jobs

    def ride(self, jobs: Sequence[tuple[str, Tensor]]) -> list[Branch]:
        """The plain optimizer from each place."""
        training, starts = self._training(), self._stacked(jobs)
        with torch.no_grad():
            state = torch.vmap(lambda *p: training.start(p))(*starts)
            step = recorded(torch.vmap(training.step), state)
            stride = max(1, self.rider.ride_steps // _PATH)
            keep = sum(p[0].numel() for p in starts) <= _PATH_SIZE
            paths: list[Tensor] = []
            for t in range(self.rider.ride_steps):
                if keep and t % stride == 0:
                    paths.append(torch.cat([p.flatten(1) for p in training.parameters(state)], 1))
                state = tuple(step(state))
        path = torch.stack([*paths, torch.cat([p.flatten(1) for p in training.parameters(state)], 1)], 1)
        result = []
        for i, (name, flat) in enumerate(jobs):
            end = tuple(p[i] for p in training.parameters(state))
            losses = [float(v) for v in training.losses(end)]
            behaviour = losses if self.behaviour is None else self.behaviour(end).flatten().tolist()
            result.append(
                Branch(
                    name=name,
                    parent=name[: max(name.rfind("+"), name.rfind("-"))],
                    start=_lists(unflatten(flat, self.like)),
                    end=_lists(end),
                    losses=losses,
                    behaviour=behaviour,
                    path=path[i].tolist() if keep else [],
                    finite=all(map(math.isfinite, losses)) and bool(torch.isfinite(path[i, -1]).all()),
                )
            )
        return result


def _lists(tensors: Sequence[Tensor]) -> list[list[float]]:
    return [t.detach().reshape(-1).tolist() for t in tensors]


default_optimizer: MakeOptimizer = partial(torch.optim.SGD, lr=1.0)
