"""Check of a hypergradient against the re-trained response, which says which assumption fails.

The truth is a central difference of the outer loss at the re-trained parameters, along random directions d:

    (L_V(w*(λ + εd), λ + εd) − L_V(w*(λ − εd), λ − εd)) / 2ε  ≈  dL_V/dλ · d
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nested.hypergradient.arguments import check_tensors
from lightning_nested.hypergradient.assumptions import Neighbourhood, inspect
from lightning_nested.hypergradient.implicit import implicit_result
from lightning_nested.hypergradient.inner_curvature import AnyCurvature
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
    """Result of :func:`check_hypergradient`; ``print`` it.

    Attributes:
        relative_error: ‖predicted − measured‖/‖measured‖ over the directions; NaN if there is no prediction.
        cosine: Cosine between predicted and measured slopes, as vectors over the directions.
        predicted: Hypergradient times direction, one per direction.
        measured: Central differences of the response, one per direction.
        inner_gradient_norm: ‖g‖/(ρ(1 + ‖w‖)) with g = ∂L_T/∂w and ρ its Rayleigh quotient |gᵀHg|/gᵀg: about
            the relative distance to a stationary point.
        curvature: Smallest Rayleigh quotient met of the curvature; negative: indefinite.
        asymmetry: ‖T − Tᵀ‖/‖T‖ of the curvature T on a Krylov space; 0 for a true Hessian.
        residual: Residual of the solver, ‖b − Ax‖/‖b‖.
        tolerance: Bound on the relative error and on the inner gradient.
        dtype: Floating type of the check.
        failures: One sentence per failed assumption, with its cure; each begins with the assumption's name.
    """

    relative_error: float
    cosine: float
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    inner_gradient_norm: float
    curvature: float
    asymmetry: float
    residual: float
    tolerance: float
    dtype: torch.dtype
    failures: tuple[str, ...]

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
        ):
            lines.append(f"  {label:<44}{'–' if math.isnan(value) else f'{value:.3g}':>16}")
        return "\n".join([*lines, *(f"  * {failure}" for failure in self.failures)])


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
) -> HypergradientReport:
    """Compare a hypergradient with the re-trained response, and say which assumption fails.

    For small problems: every direction trains twice. Computed in float64 where the losses accept it, otherwise in the
    dtype of ``params`` with a wider ε. Random numbers are the same in every call of a loss. Nothing given is changed,
    but for buffers that the losses themselves update.

    Args:
        inner_loss: ``inner_loss(params, hparams) -> scalar``.
        outer_loss: ``outer_loss(params, hparams) -> scalar``.
        params: Trained parameters w, where the hypergradient is to be taken.
        hparams: Hyperparameters λ.
        solver: As in :func:`implicit_hypergradient`.
        curvature: As in :func:`implicit_hypergradient`.
        hypergradient: The hypergradient to check; None: the implicit one with ``solver`` and ``curvature``.
        retrain: Strategy for w*(λ): ``Minimize()`` (default) from ``params``; a function of ``hparams``; or
            ``Unroll(step=..., num_steps=...)``, after which a given ``hypergradient`` is not held to the
            assumptions of implicit differentiation.
        num_directions: Random directions; the coordinate axes where there are no more of them.
        epsilon: Length of the move in λ; None: ∛eps·(1 + ‖λ‖).
        tolerance: Relative error and relative inner gradient up to which the check passes.
        generator: Draws the directions; None: a fixed seed.

    Raises:
        ValueError: Arguments or shapes that do not fit.
        FloatingPointError: A loss is not finite at the given point.

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
        problem, found = Problem.build(inner_loss, outer_loss, params, hparams), _Findings()
        response = as_response(retrain)
        directions = _directions(problem, num_directions, generator)
        measured = _measure(problem, response, directions, epsilon, tolerance, found)
        if hypergradient is None or response.stationary:
            seen = inspect(problem, curvature, tolerance, generator)
            found.failures += seen.failures
            found.around, curvature = seen.around, seen.curvature
        if hypergradient is None:
            _differentiate(problem, solver, curvature, found)
        else:
            given = zip(hypergradient, problem.hparams, strict=True)
            found.hypergradient = tuple(g.detach().to(h) for g, h in given)
        return _compare(problem, found, directions, measured, tolerance)


@dataclass
class _Findings:
    """Parts of the report, as far as they are known."""

    hypergradient: Vector | None = None
    around: Neighbourhood | None = None
    residual: float = math.nan
    noise: float = 0.0  # rounding in a measured slope
    failures: tuple[str, ...] = ()

    def fail(self, name: str, sentence: str) -> None:
        self.failures += (f"{name}: {sentence}",)


def _directions(problem: Problem, count: int, generator: torch.Generator) -> list[Vector]:
    size = sum(h.numel() for h in problem.hparams)
    if size <= count:
        rows = torch.eye(size, dtype=problem.dtype)
    else:
        rows = torch.randn(count, size, generator=generator, dtype=torch.float64)
        rows = rows / rows.norm(dim=1, keepdim=True)
    return [
        tuple(d.to(h) for d, h in zip(unflatten(row, problem.hparams), problem.hparams, strict=True))
        for row in rows
    ]


def _measure(
    problem: Problem,
    response: Response,
    directions: list[Vector],
    epsilon: float | None,
    tolerance: float,
    found: _Findings,
) -> list[float]:
    """Central differences of the outer loss at the re-trained parameters."""
    for name, value_here in (("inner_loss", problem.inner()), ("outer_loss", problem.outer())):
        if not torch.isfinite(value_here).item():
            raise FloatingPointError(f"{name} must be finite at params and hparams. Got {value_here.item()}.")
    home = tuple(h.detach() for h in problem.hparams)
    move = epsilon if epsilon is not None else problem.eps ** (1 / 3) * (1 + float(norm(home)))
    # Both sides begin in the same basin.
    start = response.start(problem.inner_loss, tuple(p.detach() for p in problem.params), home)
    distance = 0.0

    def value(direction: Vector, sign: float) -> float:
        nonlocal distance
        moved = tuple(h + sign * move * d for h, d in zip(home, direction, strict=True))
        trained = response.train(problem.inner_loss, start, moved)
        distance = max(distance, trained.distance)
        return problem.outer_loss(trained.params, moved).detach().item()

    measured = []
    for direction in directions:
        ahead, behind = value(direction, 1.0), value(direction, -1.0)
        measured.append((ahead - behind) / (2 * move))
        found.noise = max(found.noise, problem.eps * max(abs(ahead), abs(behind)) / move)
    if not all(math.isfinite(m) for m in measured):
        found.fail(
            "no response",
            f"training again must give a finite outer loss. Got slopes {measured}: lower the rates of "
            "`retrain`, or give a smaller epsilon.",
        )
    elif distance > 0.1 * tolerance * move:
        found.fail(
            "no optimum",
            "training again must end at a minimum, or the measured slopes are not exact. Got a relative "
            f"distance of {distance:.1e} to one: the inner loss has no minimum nearby, or is too badly "
            "conditioned. Regularize it, raise epsilon, or give `retrain`.",
        )
    return measured


def _differentiate(problem: Problem, solver: AnySolver, curvature: AnyCurvature, found: _Findings) -> None:
    try:
        result = implicit_result(
            problem.inner,
            problem.outer(),
            problem.params,
            problem.hparams,
            solver=solver,
            curvature=curvature,
            allow_unused=True,
        )
    except FloatingPointError as error:
        found.fail("solver failed", str(error))
        return
    found.hypergradient, found.residual = result.hypergradient, result.solution.residual


def _compare(
    problem: Problem, found: _Findings, directions: list[Vector], slopes: list[float], tolerance: float
) -> HypergradientReport:
    predicted, error, cosine = [math.nan] * len(slopes), math.nan, math.nan
    if found.hypergradient is not None:
        predicted = [float(dot(found.hypergradient, d)) for d in directions]
        p, m = torch.tensor(predicted, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64)
        # Below this size a slope is its own rounding: two zeros agree.
        floor = 10 * found.noise / tolerance
        error = float((p - m).norm()) / max(float(m.norm()), floor, torch.finfo(torch.float64).tiny)
        if min(float(p.norm()), float(m.norm())) > 0:
            cosine = float(p @ m / (p.norm() * m.norm()))
    if not error <= tolerance and found.hypergradient is not None:
        cause = "see the other points" if found.failures else "its formula or a second derivative is wrong"
        if found.residual > tolerance and not found.failures:
            cause = (
                f"the solver stopped at a residual of {found.residual:.2g}: more terms or iterations, or "
                "ConjugateGradient(), which needs the fewest products"
            )
        found.fail(
            "wrong hypergradient",
            f"it must agree with the measured slopes to {tolerance:g}. Got a relative error of {error:.2g}; "
            f"{cause}.",
        )
    return HypergradientReport(
        relative_error=error,
        cosine=cosine,
        predicted=tuple(predicted),
        measured=tuple(slopes),
        inner_gradient_norm=found.around.gradient_norm if found.around else math.nan,
        curvature=found.around.smallest if found.around else math.nan,
        asymmetry=found.around.asymmetry if found.around else math.nan,
        residual=found.residual,
        tolerance=tolerance,
        dtype=problem.dtype,
        failures=found.failures,
    )


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
    for name, value in (("epsilon", epsilon), ("tolerance", tolerance)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive. Got {value}.")
