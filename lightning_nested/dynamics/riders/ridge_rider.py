"""Ridge Rider: follow directions of negative curvature from a saddle of one loss to its different minima.

Parker-Holder, Metz, Resnick, Hu, Lerer, Letcher, Peysakhovich, Pacchiano & Foerster (2020), NeurIPS, arXiv 2011.06505.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_nested.dynamics.maps import recorded
from lightning_nested.dynamics.riders.tree import Branch, RideTree
from lightning_nested.linalg.vectors import Vector, flatten, unflatten

_DENSE = 256  # parameters up to which a saddle's whole Hessian is formed
_PATH = 60


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
        max_ridge_steps: Steps after which a ridge that goes on is left.
        refinements: Lanczos iterations a step.
        descent_rate: Rate of the final gradient descent.
        descent_steps: Its steps.
        max_depth: Levels of branching.
        max_branches: Nodes of the tree, so that a flat loss cannot branch for ever.
        curvature_tolerance: Curvature counts as negative below minus this.
        tolerance: Difference of behaviours up to which two minima are one.

    Parker-Holder et al. (2020), NeurIPS, arXiv 2011.06505.

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
        for name in ("num_directions", "max_ridge_steps", "refinements", "max_depth", "max_branches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Got {getattr(self, name)}.")
        if not (self.step_size > 0 and self.descent_rate > 0):
            raise ValueError(
                f"step_size and descent_rate must be positive. Got {self.step_size} and {self.descent_rate}."
            )

    def ride(
        self,
        loss: Callable[[Vector], Tensor],
        saddle: Vector,
        *,
        behaviour: Callable[[Vector], Tensor] | None = None,
        folder: Path | str | None = None,
    ) -> RideTree:
        """Ride from a saddle.

        Args:
            loss: Scalar of a tuple of tensors, of operations that ``torch.func`` differentiates.
            saddle: Where the gradient vanishes and the Hessian has negative eigenvalues.
            behaviour: By which minima are told apart; default the loss, which cannot tell symmetric ones.
            folder: Where finished branches are kept; a ride that was interrupted goes on from them.

        Raises:
            ValueError: There is no negative curvature at ``saddle``.
        """
        walker = _Walker(self, loss, saddle, behaviour)
        tree = RideTree(
            tolerance=self.tolerance,
            folder=None if folder is None else Path(folder),
            settings=f"{self}\nsaddle {walker.start.tolist()}\n{walker.fingerprint()}\n",
        )
        if not walker.directions(walker.start):
            raise ValueError(
                "The start must have negative curvature. Got a Hessian without a negative eigenvalue: give a saddle, "
                "or use GeneralizedRidgeRider, which looks for a branching point."
            )
        if "0" not in tree:
            tree.add([walker.node("0", None, walker.start, walker.start, [])])
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
    """One loss on flat vectors, its derivatives recorded once."""

    def __init__(
        self,
        rider: RidgeRider,
        loss: Callable[[Vector], Tensor],
        saddle: Vector,
        behaviour: Callable[[Vector], Tensor] | None,
    ) -> None:
        self.rider, self.behaviour = rider, behaviour
        self.like = tuple(p.detach() for p in saddle)
        self.start = flatten(self.like)

        def flat(w: Tensor) -> Tensor:
            return loss(unflatten(w, self.like))

        gradient = torch.func.grad(flat)

        def product(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            value: Tensor
            derivative: Tensor
            value, derivative = torch.func.jvp(gradient, (w,), (v,))  # type: ignore[misc]  # two without has_aux
            return value, derivative

        self.loss = flat
        self.gradient = recorded(gradient, self.start)
        self.product = recorded(product, self.start, torch.ones_like(self.start))
        self._hessian = torch.func.jacfwd(gradient)

    @torch.no_grad()
    def fingerprint(self) -> str:
        """Tells one loss from another: its value and a product with its Hessian at the saddle."""
        product = self.product(self.start, torch.ones_like(self.start))[1]
        return f"loss {float(self.loss(self.start)):.5g} curvature {float(product.norm()):.5g}"

    @torch.no_grad()
    def directions(self, w: Tensor) -> list[Tensor]:
        """Unit eigenvectors of negative curvature, most negative first."""
        if len(w) <= _DENSE:
            hessian = self._hessian(w)
            if not torch.isfinite(hessian).all():
                return []
            values, vectors = torch.linalg.eigh(hessian)
        else:
            values, vectors = self._lanczos(w)
        negative = values < -self.rider.curvature_tolerance
        return [v * v[v.abs().argmax()].sign() for v in vectors.mT[negative]]

    def _lanczos(self, w: Tensor, iterations: int = 60) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(len(w), generator=generator, dtype=torch.float64).to(w)
        basis, images = [v / v.norm()], []
        for _ in range(iterations):
            images.append(self.product(w, basis[-1])[1])
            stacked = torch.stack(basis)
            rest = images[-1].clone()
            for _ in range(2):
                rest -= stacked.mT @ (stacked @ rest)
            if float(rest.norm()) < 1e-8 * float(images[-1].norm()) or len(basis) == iterations:
                break
            basis.append(rest / rest.norm())
        stacked = torch.stack(basis[: len(images)])
        small = stacked @ torch.stack(images).mT
        values, vectors = torch.linalg.eigh((small + small.mT) / 2)
        return values, stacked.mT @ vectors

    @torch.no_grad()
    def branch(self, name: str, parent: str, at: Tensor, heading: Tensor, *, last: bool) -> Branch:
        """Follow one ridge, then descend if nothing negative is left."""
        w, e, path = at.clone(), heading.clone(), [at.clone()]
        w = w + self.rider.step_size * e  # at the saddle itself the direction is known
        for step in range(self.rider.max_ridge_steps):
            e, curvature = self._track(w, e)
            if (
                not curvature < -self.rider.curvature_tolerance
            ):  # NaN too: it has left where the loss is defined
                break
            w = w + self.rider.step_size * e
            if step % 5 == 0:
                path.append(w.clone())
        saddle = bool(self.directions(w)) and not last
        if not saddle:
            for step in range(self.rider.descent_steps):
                w = w - self.rider.descent_rate * self.gradient(w)
                if step % 20 == 0:
                    path.append(w.clone())
        return self.node(name, parent, at, w, path, saddle=saddle)

    def _track(self, w: Tensor, e: Tensor) -> tuple[Tensor, float]:
        """The eigenvector nearest to e and its curvature, by Lanczos iterations started from e.

        The Ritz vector of largest overlap, not of least curvature: a ridge that flattens must not be left for another.
        """
        basis, images = [e], [self.product(w, e)[1]]
        for _ in range(self.rider.refinements):
            stacked, rest = torch.stack(basis), images[-1].clone()
            for _ in range(2):
                rest -= stacked.mT @ (stacked @ rest)
            size = rest.norm()
            if float(size) <= 1e-9 * (1 + float(images[-1].norm())):
                break
            basis.append(rest / size)
            images.append(self.product(w, basis[-1])[1])
        stacked = torch.stack(basis)
        small = stacked @ torch.stack(images).mT
        if not torch.isfinite(small).all():
            return e, math.nan
        values, vectors = torch.linalg.eigh((small + small.mT) / 2)
        nearest = int(vectors[0].abs().argmax())
        tracked = stacked.mT @ vectors[:, nearest]
        return (tracked if float(tracked @ e) >= 0 else -tracked), float(values[nearest])

    def node(
        self,
        name: str,
        parent: str | None,
        start: Tensor,
        end: Tensor,
        path: list[Tensor],
        *,
        saddle: bool = True,
    ) -> Branch:
        """As plain numbers; the only exponent says whether the end is a saddle."""
        parts = unflatten(end, self.like)
        losses = [float(self.loss(end))]
        shown = losses if self.behaviour is None else self.behaviour(parts).flatten().tolist()
        stride = max(1, len(path) // _PATH)
        return Branch(
            name=name,
            parent=parent,
            start=[p.flatten().tolist() for p in unflatten(start, self.like)],
            end=[p.flatten().tolist() for p in parts],
            losses=losses,
            exponents=[float(saddle)],
            behaviour=shown,
            path=[p.tolist() for p in path[::stride]] if len(end) <= 64 else [],
            finite=bool(torch.isfinite(end).all()) and math.isfinite(losses[0]),
        )
