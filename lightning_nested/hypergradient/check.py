"""Check of a hypergradient against the re-trained response, which says which assumption fails.

The truth is a central difference of the outer loss at the re-trained parameters, along random directions d:

    (L_V(w*(λ + εd), λ + εd) − L_V(w*(λ − εd), λ − εd)) / 2ε  ≈  dL_V/dλ · d
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_nested.arguments import checked, positive
from lightning_nested.hypergradient.arguments import check_tensors
from lightning_nested.hypergradient.assumptions import Neighbourhood, inspect
from lightning_nested.hypergradient.implicit import implicit_result
from lightning_nested.hypergradient.inner_curvature import AnyCurvature
from lightning_nested.hypergradient.remaining import Remaining, compare_signs, find_remaining
from lightning_nested.hypergradient.retraining import (
    AnyResponse,
    LossFunction,
    Problem,
    Response,
    as_response,
)
from lightning_nested.linalg.solvers.given import AnySolver
from lightning_nested.linalg.vectors import Vector, dot, norm, unflatten


@dataclass(frozen=True, kw_only=True)
class HypergradientReport:
    """Result of :func:`check_hypergradient`; ``print`` it. Numbers that are unknown are NaN."""

    relative_error: float  # ‖predicted − measured‖/‖measured‖ over the directions
    cosine: float  # between predicted and measured slopes, as vectors over the directions
    predicted: tuple[float, ...]  # hypergradient times direction, one per direction
    measured: tuple[float, ...]  # central differences of the response, one per direction
    inner_gradient_norm: float  # relative distance to a stationary point, see Neighbourhood
    curvature: float  # smallest Rayleigh quotient met of the curvature; negative: indefinite
    asymmetry: float  # ‖T − Tᵀ‖/‖T‖ of the curvature T on a Krylov space; 0 for a true Hessian
    residual: float  # ‖b − Ax‖/‖b‖ of the solver
    tolerance: float  # bound on the relative error and on the inner gradient
    dtype: torch.dtype  # floating type of the check
    failures: tuple[str, ...]  # a sentence per failed assumption: its name, what was found, the cure
    # How far the parameters are from their minimum, and what that does to the hypergradient.
    remaining: Remaining = field(default_factory=Remaining)

    @property
    def passed(self) -> bool:
        """True if no assumption failed and the slopes agree within the tolerance."""
        return not self.failures

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        lines = [f"Hypergradient check: {verdict} ({str(self.dtype).removeprefix('torch.')})"]
        lines.append(f"  {'direction':<28}{'predicted':>16}{'measured':>16}")
        for i, (p, m) in enumerate(zip(self.predicted, self.measured, strict=True)):
            lines.append(f"  {i:<28}{p:>16.8g}{m:>16.8g}")
        for label, value in (
            (f"relative error (at most {self.tolerance:g})", self.relative_error),
            ("cosine", self.cosine),
            ("inner gradient, relative", self.inner_gradient_norm),
            ("smallest curvature", self.curvature),
            ("asymmetry of the curvature", self.asymmetry),
            ("residual of the solver", self.residual),
            ("remaining change of the weights, relative", self.remaining.change),
        ):
            lines.append(f"  {label:<44}{'–' if math.isnan(value) else f'{value:.3g}':>16}")
        if not math.isnan(self.inner_gradient_norm):
            lines.append(f"  {self.remaining.sentence(self.tolerance)}.")
        return "\n".join([*lines, *(f"  * {failure}" for failure in self.failures)])


@checked
def check_hypergradient(
    inner_loss: LossFunction,
    outer_loss: LossFunction,
    params: Sequence[Tensor],
    hparams: Sequence[Tensor],
    *,
    solver: AnySolver = None,
    curvature: AnyCurvature = None,
    hypergradient: Sequence[Tensor] | None = None,
    retrain: AnyResponse = None,
    num_directions: int = 3,
    epsilon: float | None = None,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
    another_batch: LossFunction | None = None,
) -> HypergradientReport:
    """Compare a hypergradient with the re-trained response, and say which assumption fails.

    For small problems: every direction trains twice. Computed in float64 where the losses accept it, otherwise in the
    dtype of ``params`` with a wider ε. Random numbers are the same in every call of a loss. Nothing given is changed,
    but for buffers that the losses themselves update. What remains up to the minimum is told, see :class:`Remaining`.

    Args:
        inner_loss: ``inner_loss(params, hparams) -> scalar``.
        outer_loss: ``outer_loss(params, hparams) -> scalar``.
        params: Trained parameters w, where the hypergradient is to be taken.
        hparams: Hyperparameters λ.
        solver: As in :func:`implicit_hypergradient`.
        curvature: As in :func:`implicit_hypergradient`.
        hypergradient: The hypergradient to check; None: the implicit one with ``solver`` and ``curvature``.
        retrain: Strategy for w*(λ): ``Minimize()`` (default) from ``params``, a function of ``hparams``, or
            ``Unroll(step=..., num_steps=...)``, which makes no assumption about a given ``hypergradient``.
        num_directions: Random directions; the coordinate axes where there are no more of them.
        epsilon: Length of the move in λ; None: ∛eps·(1 + ‖λ‖).
        tolerance: Relative error and relative inner gradient up to which the check passes.
        generator: Draws the directions; None: a fixed seed.
        another_batch: The inner loss on another batch, to compare the inner gradient with its noise.

    Example:
        Inner ½(w−λ)² + ½w², outer ½(w−2)²; at λ = 3 and its optimum w = 1.5 the slope is −0.25.

        >>> inner = lambda w, h: ((w[0] - h[0]) ** 2 / 2 + w[0] ** 2 / 2).sum()
        >>> outer = lambda w, h: ((w[0] - 2) ** 2 / 2).sum()
        >>> check_hypergradient(inner, outer, [torch.tensor([1.5])], [torch.tensor([3.0])]).passed
        True
    """
    _check_arguments(params, hparams, hypergradient, num_directions, epsilon, tolerance)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    with torch.enable_grad():
        check = _Check(Problem.build(inner_loss, outer_loss, params, hparams), tolerance)
        response = as_response(retrain)
        directions = _directions(check.problem.hparams, num_directions, generator)
        measured = check.measure(response, directions, epsilon)
        if hypergradient is None or response.stationary:
            failures, check.around, curvature = inspect(check.problem, curvature, tolerance, generator)
            check.failures += failures
        check.differentiate(hypergradient, solver, curvature)
        check.find_remaining(solver, curvature, another_batch)
        return check.report(directions, measured)


def _directions(hparams: Vector, count: int, generator: torch.Generator) -> list[Vector]:
    size = sum(h.numel() for h in hparams)
    if size <= count:
        rows = torch.eye(size, dtype=hparams[0].dtype)
    else:
        rows = torch.randn(count, size, generator=generator, dtype=torch.float64)
        rows = rows / rows.norm(dim=1, keepdim=True)
    return [tuple(d.to(h) for d, h in zip(unflatten(r, hparams), hparams, strict=True)) for r in rows]


class _Check:
    """A check in progress: the parts of its report, as far as they are known."""

    def __init__(self, problem: Problem, tolerance: float) -> None:
        self.problem, self.tolerance = problem, tolerance
        self.hypergradient: Vector | None = None
        self.around: Neighbourhood | None = None
        self.remaining = Remaining()
        self.residual = math.nan
        self.noise = 0.0  # rounding in a measured slope
        self.failures: list[str] = []

    def measure(self, response: Response, directions: list[Vector], epsilon: float | None) -> list[float]:
        """Central differences of the outer loss at the re-trained parameters."""
        problem = self.problem
        for name, loss in (("inner_loss", problem.inner()), ("outer_loss", problem.outer())):
            if not torch.isfinite(loss).item():
                raise FloatingPointError(f"{name} must be finite at params and hparams. Got {loss.item()}.")
        home = tuple(h.detach() for h in problem.hparams)
        move = epsilon if epsilon is not None else problem.eps ** (1 / 3) * (1 + float(norm(home)))
        # Both sides begin in the same basin.
        start = response.start(problem.inner_loss, tuple(p.detach() for p in problem.params), home)
        measured, distance = [], 0.0
        for direction in directions:
            values = []
            for sign in (1.0, -1.0):
                moved = tuple(h + sign * move * d for h, d in zip(home, direction, strict=True))
                trained = response.train(problem.inner_loss, start, moved)
                distance = max(distance, trained.distance)
                values.append(problem.outer_loss(trained.params, moved).detach().item())
            measured.append((values[0] - values[1]) / (2 * move))
            self.noise = max(self.noise, problem.eps * max(abs(v) for v in values) / move)
        if not all(math.isfinite(m) for m in measured):
            self.failures.append(
                f"no response: training again must give a finite outer loss. Got slopes {measured}: lower the rates of "
                "`retrain`, or give a smaller epsilon."
            )
        elif distance > 0.1 * self.tolerance * move:
            self.failures.append(
                "no optimum: training again must end at a minimum, or the measured slopes are not exact. Got a "
                f"relative distance of {distance:.1e} to one: the inner loss has no minimum nearby, or is too badly "
                "conditioned. Regularize it, raise epsilon, or give `retrain`."
            )
        return measured

    def differentiate(
        self, hypergradient: Sequence[Tensor] | None, solver: AnySolver, curvature: AnyCurvature
    ) -> None:
        """Take a given hypergradient, or find the implicit one, unless the solver fails."""
        problem = self.problem
        if hypergradient is not None:
            pairs = zip(hypergradient, problem.hparams, strict=True)
            self.hypergradient = tuple(g.detach().to(h) for g, h in pairs)
            return
        given = problem.inner, problem.outer(), problem.params, problem.hparams
        try:
            result = implicit_result(*given, solver=solver, curvature=curvature, allow_unused=True)
        except FloatingPointError as error:
            self.failures.append(f"solver failed: {error}")
        else:
            self.hypergradient, self.residual = result.hypergradient, result.solution.residual

    def find_remaining(
        self, solver: AnySolver, curvature: AnyCurvature, another: LossFunction | None
    ) -> None:
        """Find the minimum nearby, and the hypergradient there, if the inner loss is finite around the parameters."""
        if self.around is None:
            return
        self.remaining, moved = find_remaining(self.problem, curvature, self.around.smallest, another)
        if moved is not None and self.hypergradient is not None:
            self.remaining = compare_signs(
                self.remaining, self.problem, moved, self.hypergradient, solver=solver, curvature=curvature
            )

    def report(self, directions: list[Vector], measured: list[float]) -> HypergradientReport:
        """Compare the slopes and conclude."""
        predicted, error, cosine, tolerance = [math.nan] * len(measured), math.nan, math.nan, self.tolerance
        if self.hypergradient is not None:
            predicted = [float(dot(self.hypergradient, d)) for d in directions]
            p, m = torch.tensor(predicted, dtype=torch.float64), torch.tensor(measured, dtype=torch.float64)
            # Below this size a slope is its own rounding: two zeros agree.
            floor = max(10 * self.noise / tolerance, torch.finfo(torch.float64).tiny)
            error = float((p - m).norm()) / max(float(m.norm()), floor)
            if min(float(p.norm()), float(m.norm())) > 0:
                cosine = float(p @ m / (p.norm() * m.norm()))
            if not error <= tolerance:
                self.failures.append(
                    f"wrong hypergradient: it must agree with the measured slopes to {tolerance:g}. Got a relative "
                    f"error of {error:.2g}; {self._cause()}."
                )
        return HypergradientReport(
            relative_error=error,
            cosine=cosine,
            predicted=tuple(predicted),
            measured=tuple(measured),
            inner_gradient_norm=self.around.gradient_norm if self.around else math.nan,
            curvature=self.around.smallest if self.around else math.nan,
            asymmetry=self.around.asymmetry if self.around else math.nan,
            residual=self.residual,
            tolerance=tolerance,
            dtype=self.problem.dtype,
            failures=tuple(self.failures),
            remaining=self.remaining,
        )

    def _cause(self) -> str:
        if self.failures:
            return "see the other points"
        if self.residual > self.tolerance:
            return (
                f"the solver stopped at a residual of {self.residual:.2g}: more terms or iterations, or "
                "ConjugateGradient(), which needs the fewest products"
            )
        return "its formula or a second derivative is wrong"


def _check_arguments(
    params: Sequence[Tensor],
    hparams: Sequence[Tensor],
    hypergradient: Sequence[Tensor] | None,
    num_directions: int,
    epsilon: float | None,
    tolerance: float,
) -> None:
    check_tensors("params", params)
    check_tensors("hparams", hparams)
    if hypergradient is not None and [g.shape for g in hypergradient] != [h.shape for h in hparams]:
        raise ValueError(
            f"hypergradient must be shaped as hparams, {[tuple(h.shape) for h in hparams]}. "
            f"Got {[tuple(g.shape) for g in hypergradient]}."
        )
    if num_directions < 1:
        raise ValueError(f"num_directions must be >= 1. Got {num_directions}.")
    positive(epsilon=epsilon, tolerance=tolerance)
