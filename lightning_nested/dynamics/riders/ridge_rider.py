"""Ridge Rider: follow directions of negative curvature from a saddle of one loss to its different minima."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.dynamics.frames import krylov, symmetric_ritz
from lightning_nested.dynamics.maps import recorded
from lightning_nested.dynamics.riders.tree import PATH_POINTS, PATH_SIZE, Branch, RideTree
from lightning_nested.linalg.vectors import Vector, flatten, unflatten

Score: TypeAlias = Callable[[Vector], Tensor]
_DENSE = 256  # parameters up to which a saddle's whole Hessian is formed
_LANCZOS = 60  # iterations for the directions of a larger one


@checked
@dataclass(frozen=True, kw_only=True)
class RidgeRider:
    """Finds different minima of one loss from one saddle.

    At a saddle, follow ±e for the ``num_directions`` most negative eigenvalues: w ← w + step_size·e, with e tracked by
    ``refinements`` Lanczos iterations at every step, started from the previous e and kept on its side. A ridge
    ends where its curvature is no longer negative. If other negative curvature is left there, branch again; otherwise
    descend to the minimum. Ends that behave alike count once.

    Attributes:
        num_directions: Directions at each saddle, most negative first; 1 finds 2^d minima in 2^d descents.
        step_size: Length of a step along the ridge.
        max_ridge_steps: Largest number of steps along a ridge.
        refinements: Lanczos iterations a step.
        descent_rate: Learning rate of the final gradient descent.
        descent_steps: Steps of the final gradient descent.
        max_depth: Levels of branching.
        max_branches: Largest number of nodes, so that a flat loss cannot branch for ever.
        curvature_tolerance: Threshold below whose negative a curvature counts as negative.
        tolerance: Difference of behaviours up to which two minima are one.

    Parker-Holder, Metz, Resnick, Hu, Lerer, Letcher, Peysakhovich, Pacchiano & Foerster (2020), NeurIPS,
    arXiv 2011.06505.

    >>> double_well = lambda w: ((w[0] ** 2 - 1) ** 2).sum()
    >>> tree = RidgeRider().ride(double_well, (torch.zeros(2, dtype=torch.float64),), behaviour=lambda w: w[0])
    >>> sorted([round(x) for x in s.behaviour] for s in tree.solutions())
    [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    """

    num_directions: int = 1
    step_size: float = 0.05
    max_ridge_steps: int = 400
    refinements: int = 3
    descent_rate: float = 0.05
    descent_steps: int = 400
    max_depth: int = 16
    max_branches: int = 4096
    curvature_tolerance: float = 1e-6
    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        at_least(1, num_directions=self.num_directions, max_ridge_steps=self.max_ridge_steps)
        at_least(1, refinements=self.refinements)
        at_least(1, max_depth=self.max_depth, max_branches=self.max_branches)
        at_least(0, descent_steps=self.descent_steps)
        at_least(0, curvature_tolerance=self.curvature_tolerance, tolerance=self.tolerance)
        positive(step_size=self.step_size, descent_rate=self.descent_rate)

    def ride(
        self,
        loss: Score,
        saddle: Vector,
        *,
        behaviour: Score | None = None,
        folder: Path | str | None = None,
    ) -> RideTree:
        """Ride from a saddle to the minima around it.

        Args:
            loss: Scalar of a tuple of tensors, of operations that ``torch.func`` differentiates.
            saddle: Point where the gradient vanishes and the Hessian has negative eigenvalues.
            behaviour: Function that tells minima apart; default the loss, which cannot tell symmetric ones.
            folder: Folder that keeps finished branches; a ride that was interrupted goes on from them.

        Raises:
            ValueError: There is no negative curvature at ``saddle``.
        """
        walker = _Walker(self, loss, saddle, behaviour)
        settings = f"{self}\nsaddle {walker.start.tolist()}\n{walker.fingerprint()}\n"
        kept = None if folder is None else Path(folder)
        tree = RideTree(tolerance=self.tolerance, folder=kept, settings=settings)
        if not walker.directions(walker.start):
            raise ValueError(
                "The start must have negative curvature. Got a Hessian without a negative eigenvalue: give a saddle, "
                "or use GeneralizedRidgeRider, which looks for a branching point."
            )
        if "0" not in tree:
            tree.add([walker.node("0", None, walker.start, walker.start, [], saddle=True)])
        open_nodes = [("0", 0)]
        while open_nodes:
            name, depth = open_nodes.pop(0)
            at = flatten(tree.branches[name].tensors(walker.like))
            for d, direction in enumerate(walker.directions(at)[: self.num_directions]):
                for sign, heading in (("+", direction), ("-", -direction)):
                    child = f"{name}{sign}{d}"
                    if child not in tree:
                        if len(tree.branches) >= self.max_branches:
                            return tree
                        tree.add([walker.branch(child, name, at, heading, last=depth + 1 >= self.max_depth)])
                    if depth + 1 < self.max_depth and tree.branches[child].exponents[:1] == [1.0]:
                        open_nodes.append((child, depth + 1))
        return tree


class _Walker:
    """A loss on flat vectors, with its derivatives recorded once."""

    def __init__(self, rider: RidgeRider, loss: Score, saddle: Vector, behaviour: Score | None) -> None:
        self.rider, self.behaviour = rider, behaviour
        self.like = tuple(p.detach() for p in saddle)
        self.start = flatten(self.like)

        self.loss: Callable[[Tensor], Tensor] = lambda w: loss(unflatten(w, self.like))
        gradient = torch.func.grad(self.loss)
        self.gradient = recorded(gradient, self.start)
        ones = torch.ones_like(self.start)
        self.product = recorded(lambda w, v: torch.func.jvp(gradient, (w,), (v,))[1], self.start, ones)
        self._hessian = torch.func.jacfwd(gradient)

    @torch.no_grad()
    def fingerprint(self) -> str:
        """Return text that tells one loss from another: its value and a product with its Hessian at the saddle."""
        product = self.product(self.start, torch.ones_like(self.start))
        return f"loss {float(self.loss(self.start)):.5g} curvature {float(product.norm()):.5g}"

    @torch.no_grad()
    def directions(self, w: Tensor) -> list[Tensor]:
        """Return unit eigenvectors of negative curvature, most negative first."""
        if len(w) <= _DENSE:
            hessian = self._hessian(w)
            if not torch.isfinite(hessian).all():
                return []
            values, vectors = torch.linalg.eigh(hessian)
            rows = vectors.mT
        else:
            generator = torch.Generator().manual_seed(0)
            first = torch.randn(len(w), generator=generator, dtype=torch.float64).to(w)
            basis, images = krylov(partial(self.product, w), first, _LANCZOS)
            if not torch.isfinite(images).all():
                return []
            values, coordinates = symmetric_ritz(basis, images)
            rows = coordinates @ basis
        return [v * v[v.abs().argmax()].sign() for v in rows[values < -self.rider.curvature_tolerance]]

    @torch.no_grad()
    def branch(self, name: str, parent: str, at: Tensor, heading: Tensor, *, last: bool) -> Branch:
        """Follow one ridge, then descend if no negative curvature is left."""
        # at the saddle itself the direction is known
        w, e, path = at + self.rider.step_size * heading, heading, [at]
        for step in range(self.rider.max_ridge_steps):
            e, curvature = self._track(w, e)
            # NaN ends the ridge too: it has left where the loss is defined.
            if not curvature < -self.rider.curvature_tolerance:
                break
            w = w + self.rider.step_size * e
            if step % 5 == 0:
                path.append(w)
        saddle = bool(self.directions(w)) and not last
        if not saddle:
            for step in range(self.rider.descent_steps):
                w = w - self.rider.descent_rate * self.gradient(w)
                if step % 20 == 0:
                    path.append(w)
        return self.node(name, parent, at, w, path, saddle=saddle)

    def _track(self, w: Tensor, e: Tensor) -> tuple[Tensor, float]:
        """Return the eigenvector nearest to e and its curvature, by Lanczos iterations that start from e.

        The Ritz vector of largest overlap, not of least curvature: a ridge that flattens must not be left for another.
        """
        basis, images = krylov(partial(self.product, w), e, self.rider.refinements + 1)
        if not torch.isfinite(images).all():
            return e, math.nan
        values, coordinates = symmetric_ritz(basis, images)
        nearest = int(coordinates[:, 0].abs().argmax())
        tracked = coordinates[nearest] @ basis
        return (tracked if float(tracked @ e) >= 0 else -tracked), float(values[nearest])

    def node(
        self, name: str, parent: str | None, start: Tensor, end: Tensor, path: list[Tensor], *, saddle: bool
    ) -> Branch:
        """Return a finished branch; its only exponent is 1 if the end is a saddle, else 0."""
        parts, losses = unflatten(end, self.like), [float(self.loss(end))]
        kept = path[:: max(1, len(path) // PATH_POINTS)] if len(end) <= PATH_SIZE else []
        return Branch.from_tensors(
            unflatten(start, self.like),
            parts,
            name=name,
            parent=parent,
            losses=losses,
            exponents=[float(saddle)],
            behaviour=losses if self.behaviour is None else self.behaviour(parts).flatten().tolist(),
            path=[p.tolist() for p in kept],
        )
