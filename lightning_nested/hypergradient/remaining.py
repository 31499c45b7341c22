"""How far parameters are from the minimum of the inner loss, and what the way there does to a hypergradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_nested.hypergradient.implicit import implicit_result
from lightning_nested.hypergradient.inner_curvature import AnyCurvature, as_curvature
from lightning_nested.hypergradient.retraining import LossFunction, Problem
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.solvers.conjugate_gradient import ConjugateGradient
from lightning_nested.linalg.solvers.given import AnySolver
from lightning_nested.linalg.vectors import Vector, flatten, norm

# Below this share of the largest a hypergradient is its own rounding, and has no sign.
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Remaining:
    """The change of the parameters w that is left, z = (H + δ)⁻¹∂L_T/∂w with δ > 0 where H is indefinite.

    At w − z, where the training is heading, the formula of implicit differentiation holds. Unknown numbers are NaN.
    """

    change: float = math.nan  # ‖z‖/‖w‖
    flipped: int = 0  # hypergradients with another sign at w − z than at w
    compared: int = 0  # hypergradients that have a sign at either; 0: not known
    signal: float = math.nan  # ‖(g₁ + g₂)/2‖/‖(g₁ − g₂)/2‖ of the gradients on two batches

    @property
    def agreement(self) -> float:
        """Share of the hypergradients that have the same sign at w and at w − z."""
        return 1 - self.flipped / self.compared if self.compared else math.nan

    def sentence(self, tolerance: float) -> str:
        """Say what it means for the hypergradient, a minimum being one up to ``tolerance``."""
        if math.isnan(self.change):
            return "how far the weights are from a minimum is not known: the curvature has none nearby"
        percent = f"{100 * self.change:.2g} %"
        if self.change <= tolerance:
            text = f"the weights are at their minimum, to {percent} of their size: the formula holds here"
        else:
            text = f"the weights still have to change by {percent} of their size to be at their minimum"
            if self.compared and self.flipped:
                text += (
                    f", where {self.flipped} of {self.compared} hypergradients have the other sign: train further, "
                    "or take the hypergradient where the training leads (at=LookAhead())"
                )
            elif self.compared:
                text += ", where every hypergradient has the sign it has here: its direction holds, its size may not"
        if not math.isnan(self.signal):
            text += f"; the inner gradient is {self.signal:.2g} times its noise from batch to batch"
            if self.signal < 2:
                text += ", too little to tell it from zero"
        return text


def find_remaining(
    problem: Problem, curvature: AnyCurvature, smallest: float, another: LossFunction | None
) -> tuple[Remaining, Vector | None]:
    """Find the step to the minimum of a model of the inner loss, at most 500 products with its curvature.

    Args:
        problem: Losses and parameters.
        curvature: As in :func:`implicit_hypergradient`.
        smallest: Smallest Rayleigh quotient met of it; H is shifted by 1.5 times a negative one.
        another: Inner loss on another batch; None: there is one.

    Returns:
        What is left, without hypergradients; and w − z, if there is one.
    """
    params = problem.params
    around = as_curvature(curvature).linearize(problem.inner, params)
    signal = math.nan
    if another is not None:
        value = another(params, problem.hparams)
        second = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
        pairs = tuple(zip(around.gradient, second, strict=True))
        noise = float(norm(tuple((a - b) / 2 for a, b in pairs)))
        signal = float(norm(tuple((a + b) / 2 for a, b in pairs))) / noise if noise > 0 else math.inf
    step = _step(around.curvature, around.gradient, smallest)
    if step is None:
        return Remaining(signal=signal), None
    length, size = float(norm(step)), float(norm(tuple(p.detach() for p in params)))
    change = length / size if size > 0 else (math.inf if length > 0 else 0.0)
    moved = tuple((p.detach() - z).requires_grad_() for p, z in zip(params, step, strict=True))
    return Remaining(change=change, signal=signal), moved


def _step(curvature: LinearOperator, gradient: Vector, smallest: float) -> Vector | None:
    for damping in (0.0, -1.5 * smallest):
        if damping < 0:
            break
        solver = ConjugateGradient(max_iterations=500, tolerance=1e-8, damping=damping)
        try:
            solution = solver.solve(curvature, gradient)
        except FloatingPointError:
            continue
        if solution.status != "negative_curvature":
            return solution.x
    return None


def compare_signs(
    remaining: Remaining,
    problem: Problem,
    moved: Vector,
    hypergradient: Vector,
    *,
    solver: AnySolver,
    curvature: AnyCurvature,
) -> Remaining:
    """Add the comparison of a hypergradient with the implicit one at the parameters ``moved``."""

    def inner() -> Tensor:
        return problem.inner_loss(moved, problem.hparams)

    outer = problem.outer_loss(moved, problem.hparams)
    try:
        found = implicit_result(
            inner, outer, moved, problem.hparams, solver=solver, curvature=curvature, allow_unused=True
        )
    # The solver fails there, or a curvature is bound to the graph at w.
    except (FloatingPointError, RuntimeError):
        return remaining
    here, there = flatten(hypergradient), flatten(found.hypergradient)
    largest = torch.maximum(here.abs(), there.abs())
    signed = largest > _ROUNDING * float(largest.max())
    flipped = signed & (here * there < 0)
    return replace(remaining, flipped=int(flipped.sum()), compared=int(signed.sum()))
