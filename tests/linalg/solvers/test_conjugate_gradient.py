"""Conjugate gradient: its rate, preconditioners, warm starts, and its end where squares underflow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_nested.hypergradient import (
    ConjugateGradient,
    Neumann,
    Nystrom,
    SolverState,
)
from lightning_nested.linalg.curvature import HessianOperator
from lightning_nested.linalg.kronecker import KroneckerFisher
from lightning_nested.linalg.operators import DiagonalOperator, LinearOperator, as_operator
from tests.linalg.solvers.systems import DOUBLE, INVERSE, MATRIX, B, spd


def test_conjugate_gradient_converges_at_its_rate_and_before_the_series() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = spd(200, 32.0, generator)
    b = (torch.randn(200, dtype=DOUBLE, generator=generator),)
    operator, truth = as_operator(matrix, b), torch.linalg.solve(matrix, b[0])

    def products(make, limit: int) -> int:  # type: ignore[no-untyped-def]
        for k in range(1, limit):
            x = make(k).solve(operator, b).x[0]
            if torch.linalg.vector_norm(x - truth) <= 0.01 * torch.linalg.vector_norm(truth):
                return k
        return limit

    assert products(lambda k: ConjugateGradient(max_iterations=k, tolerance=0.0), 100) <= 14
    assert products(lambda k: Neumann(num_terms=k, step_size=1.0), 200) > 50


class Seen(LinearOperator):
    """A matrix that keeps the Rayleigh quotient of each vector that it multiplies."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.quotients = matrix, []

    def matvec(self, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        product = self.matrix @ v[0]
        self.quotients.append(float(v[0] @ product / (v[0] @ v[0])))
        return (product,)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 12, 40])
def test_the_curvature_is_the_smallest_rayleigh_quotient(steps: int, preconditioned: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    matrix = spd(60, 1e3, generator)
    seen = Seen(matrix)
    solver = ConjugateGradient(
        max_iterations=steps,
        tolerance=0.0,
        preconditioner=torch.diag(1 / matrix.diagonal()) if preconditioned else None,
    )
    solution = solver.solve(seen, (torch.randn(60, dtype=DOUBLE, generator=generator),))
    assert len(seen.quotients) == steps
    assert solution.curvature == pytest.approx(min(seen.quotients), rel=1e-9)


def test_nystrom_as_preconditioner_saves_products() -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = spd(100, 1e4, generator) + 1e-3 * torch.eye(100, dtype=DOUBLE)
    b = (torch.randn(100, dtype=DOUBLE, generator=generator),)
    operator = as_operator(matrix, b)
    plain = ConjugateGradient(max_iterations=500, tolerance=1e-8)
    inverse = Nystrom(rank=50, damping=1e-3).factor(operator, b)
    helped = ConjugateGradient(max_iterations=500, tolerance=1e-8, preconditioner=inverse)
    assert helped.solve(operator, b).iterations < plain.solve(operator, b).iterations / 2


def test_kronecker_factors_as_preconditioner_save_products() -> None:
    """Least squares with inputs of sizes 1 to 100 and a decay: the solution is that of the dense Hessian."""
    generator = torch.Generator().manual_seed(4)
    layer, sizes = nn.Linear(40, 3, bias=False, dtype=DOUBLE), torch.logspace(0, 2, 40, dtype=DOUBLE)
    x = sizes * torch.randn(400, 40, dtype=DOUBLE, generator=generator)
    # Near the minimum errors are noise, and their second moments close to a multiple of the identity.
    y = layer(x).detach() + torch.randn(400, 3, dtype=DOUBLE, generator=generator)
    w, decay = layer.weight, 1e-2
    fisher = KroneckerFisher(layer, {"weight": w})

    def loss() -> Tensor:
        return 0.5 * (layer(x) - y).square().sum(1).mean()

    with fisher.observing():
        loss().backward()
    fisher.update()
    operator = HessianOperator(loss(), (w,)) + DiagonalOperator(decay)
    b = (torch.randn(3, 40, dtype=DOUBLE, generator=generator),)
    truth = torch.linalg.solve(x.T @ x / 400 + decay * torch.eye(40, dtype=DOUBLE), b[0].T).T
    found = [
        ConjugateGradient(max_iterations=500, tolerance=1e-10, preconditioner=inverse).solve(operator, b)
        for inverse in (None, fisher.inverse([decay]))
    ]
    for solution in found:
        # A relative residual of 1e-10 times the condition number, below 1e6.
        torch.testing.assert_close(solution.x[0], truth, rtol=0, atol=1e-4 * float(truth.norm()))
    assert found[1].iterations < found[0].iterations / 2


def test_warm_start_from_a_far_solution_is_dropped() -> None:
    solver = ConjugateGradient(tolerance=1e-12, warm_start=True)
    state = SolverState(solution=(1e6 * torch.ones(3, dtype=DOUBLE),))
    solution = solver.solve(as_operator(MATRIX, B), B, state=state)
    torch.testing.assert_close(solution.x[0], INVERSE @ B[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("diagonal", [[0.0, 0.0, 0.0], [1.0, -1.0, -1.0]])
def test_a_preconditioner_that_is_not_positive_definite_is_named(diagonal: list[float]) -> None:
    solver = ConjugateGradient(preconditioner=torch.diag(torch.tensor(diagonal, dtype=DOUBLE)))
    with pytest.raises(FloatingPointError, match="preconditioner M is not positive definite"):
        solver.solve(as_operator(MATRIX, B), B)


def test_conjugate_gradient_ends_where_its_squares_underflow() -> None:
    tiny = (
        torch.full((3,), 3e-23),
    )  # the square of the first residual is the least number above zero in float32
    x = ConjugateGradient().solve(DiagonalOperator(2.0), tiny).x[0]
    assert torch.isfinite(x).all()
    assert (x > 0).all()
