"""Assumptions of implicit differentiation about the inner loss, tested around given parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nested.hypergradient.implicit import unseen_hyperparameter
from lightning_nested.hypergradient.inner_curvature import AnyCurvature, Curvature, FiniteDifference, Hessian
from lightning_nested.hypergradient.retraining import Problem
from lightning_nested.linalg.curvature import HessianOperator
from lightning_nested.linalg.finite import check_matrix
from lightning_nested.linalg.graph import OTHER_FORMS, DoubleBackwardError, graph_nodes, vjp
from lightning_nested.linalg.operators import as_operator
from lightning_nested.linalg.vectors import flatten, unflatten

_PRODUCTS = 30  # enough for the end of a spectrum; a stronger search is a matter of more products


def inspect(
    problem: Problem, curvature: AnyCurvature, tolerance: float, generator: torch.Generator
) -> tuple[list[str], Neighbourhood | None, AnyCurvature]:
    """Test every assumption about the inner loss, also after one has failed.

    Returns:
        One sentence per assumption that fails; the inner loss around the parameters, if it is finite there; and a
        curvature that works.
    """
    failures, twice = [], True
    around: Neighbourhood | None = None
    try:
        around = explore(problem, curvature, generator)
    except FloatingPointError as error:
        failures.append(f"not finite: {error}")
    except DoubleBackwardError as error:
        failures.append(
            "no double backward: every operation of inner_loss must have a second derivative. Got "
            f"{blocking_operations(problem.inner(), str(error))} without: run it in a form that has one "
            f"({OTHER_FORMS}), or use curvature=FiniteDifference(), as was done for the figures here."
        )
        twice, curvature = False, FiniteDifference()
        with suppress(FloatingPointError):  # the solver meets it again, and says so
            around = explore(problem, curvature, generator)
    twice = twice and not isinstance(curvature, FiniteDifference)
    not_seen = unseen(problem, twice=twice)
    failures += [unseen_hyperparameter(i, outer_sees=sees) for i, sees in not_seen.items()]
    if around is not None:
        failures += _failures_around(around, tolerance, problem.eps)
    return failures, around, curvature


def _failures_around(around: Neighbourhood, tolerance: float, eps: float) -> Iterator[str]:
    if around.gradient_norm > tolerance:
        yield (
            "not stationary: params must be a stationary point of inner_loss. Got a gradient of relative "
            f"norm {around.gradient_norm:.2g}, more than {tolerance:g}: train further (lower rate, full "
            "batch), or use unrolled_hypergradient, which needs no stationary point."
        )
    # Products by differences are exact to about ∛eps² only; a wrong second derivative is off by per cents.
    rounding = eps ** (1 / 3)
    if around.smallest < -rounding * around.largest:
        yield (
            "indefinite Hessian: the inner curvature must be positive definite. Got a Rayleigh quotient of "
            f"{around.smallest:.3g} beside {around.largest:.3g}: params are at a saddle or a maximum; train "
            "further, add damping or weight decay, or use curvature=GaussNewton(outputs=...)."
        )
    if around.asymmetry > 10 * rounding:
        yield (
            "asymmetric Hessian: products must satisfy uᵀHv = vᵀHu. Got a relative asymmetry of "
            f"{around.asymmetry:.2g}: a second derivative is wrong. In torch 2.14 grad(jvp(f)) is, through "
            "LayerNorm, BatchNorm and InstanceNorm; a custom autograd.Function may be. Use the default "
            "curvature=Hessian(), or FiniteDifference()."
        )


@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """The inner loss around w, from products with its curvature H.

    ``gradient_norm`` is ‖g‖/(ρ(1 + ‖w‖)) with ρ = |gᵀHg|/gᵀg: the relative length of the step along the gradient
    that reaches its zero. ``asymmetry`` is ‖T − Tᵀ‖/‖T‖ with T = QᵀHQ on the Krylov space.
    """

    gradient_norm: float
    smallest: float  # Rayleigh quotient of H on a Krylov space; H is indefinite if it is negative
    largest: float  # absolute value of one
    asymmetry: float  # 0 to rounding for a Hessian


def explore(problem: Problem, curvature: AnyCurvature, generator: torch.Generator) -> Neighbourhood:
    """Look around the parameters by at most 30 products from a random start, and one along the gradient.

    Raises:
        DoubleBackwardError: An operation of the inner loss has no second derivative.
    """
    params, given = problem.params, None
    strategy = Hessian() if curvature is None else curvature
    if not isinstance(strategy, Curvature):
        # First derivatives only: the loss of a given curvature may have no second ones.
        given, strategy = as_operator(strategy, params), FiniteDifference()
    around = strategy.linearize(problem.inner, params)
    operator = around.curvature if given is None else given

    def product(v: Tensor) -> Tensor:
        return flatten(operator.matvec(unflatten(v, params)))

    g = flatten(around.gradient)
    size, rho = float(g.norm()), math.nan
    if size > 0:
        u = g / size
        rho = abs(float(u @ product(u)))
    start = torch.randn(g.numel(), generator=generator, dtype=torch.float64).to(g)
    start = start / start.norm()
    if isinstance(operator, HessianOperator):
        _refuse_wrong_product(problem, start, product(start))
    projected = check_matrix(_project(product, start), "Products with the curvature")
    ritz = torch.linalg.eigvalsh((projected + projected.T) / 2)
    scale = float(torch.linalg.matrix_norm(projected))
    largest = float(ritz.abs().max())
    w = float(flatten(p.detach() for p in params).norm())
    curved = rho if rho > torch.finfo(g.dtype).eps * largest else largest
    return Neighbourhood(
        gradient_norm=0.0 if size == 0 else size / (curved * (1 + w)) if curved > 0 else math.inf,
        smallest=float(ritz[0]),
        largest=largest,
        asymmetry=float(torch.linalg.matrix_norm(projected - projected.T)) / scale if scale > 0 else 0.0,
    )


def _project(product: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """T = QᵀHQ on the Krylov space of ``start``.

    Lanczos (1950), J. Res. Natl. Bur. Stand. 45:255-282, with full orthogonalization.
    """
    basis, images = [start], []
    for _ in range(min(_PRODUCTS, start.numel())):
        image = product(basis[-1])
        images.append(image)
        rest = image
        for _ in range(2):  # once is not enough where the space is nearly exhausted
            for q in basis:
                rest = rest - (q @ rest) * q
        if float(rest.norm()) <= torch.finfo(start.dtype).eps ** 0.5 * float(image.norm()):
            break
        basis.append(rest / rest.norm())
    return torch.stack(basis[: len(images)]) @ torch.stack(images, dim=1)


def _refuse_wrong_product(problem: Problem, v: Tensor, product: Tensor) -> None:
    """Compare with the difference of two gradients, because autograd does not always raise.

    Behind @once_differentiable a gradient can come back as a constant, and its part of the Hessian as zero.
    """
    # A short move: ReLU has kinks.
    eps = torch.finfo(v.dtype).eps
    strategy = FiniteDifference(epsilon=eps**0.5)
    truth = strategy.linearize(problem.inner, problem.params).curvature @ v
    error = float((product - truth).norm()) / max(float(truth.norm()), torch.finfo(v.dtype).tiny)
    if error > 10 * eps ** (1 / 3):
        raise DoubleBackwardError(f"Hessian products differ from differences of gradients by {error:.2g}")


def unseen(problem: Problem, *, twice: bool) -> dict[int, bool]:
    """Find hyperparameters that the inner gradient does not depend on: index → whether the outer loss does.

    Without second derivatives (``twice=False``) the dependence of the inner loss itself tells nearly as much.
    """
    direct = torch.autograd.grad(problem.outer(), problem.hparams, allow_unused=True)
    inner = problem.inner()
    outputs: Sequence[Tensor | None] = [inner]
    if twice:
        outputs = torch.autograd.grad(inner, problem.params, create_graph=True, allow_unused=True)
    ones = [None if x is None else torch.ones_like(x) for x in outputs]
    indirect = vjp(outputs, problem.hparams, ones)
    return {i: direct[i] is not None for i, m in enumerate(indirect) if m is None}


def blocking_operations(loss: Tensor, message: str) -> str:
    """Name the operation without a second derivative, from autograd's message or as a custom one in the graph."""
    if "weight_norm" in message:
        return "weight_norm"
    if found := re.search(r"derivative for (\S+) is not implemented", message):
        return found[1]
    kind = torch.autograd.function.BackwardCFunction
    custom = {type(n).__name__.removesuffix("Backward") for n in graph_nodes([loss]) if isinstance(n, kind)}
    return ", ".join(sorted(custom)) or "an unnamed operation"
