"""Every solver on matrices: values, reports, warm starts, and each way to fail."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nested.hypergradient import (
    ConjugateGradient,
    DenseSolve,
    Identity,
    InverseSolver,
    Neumann,
    Nystrom,
    SolverState,
)
from lightning_nested.linalg.operators import DiagonalOperator, as_operator
from tests.linalg.solvers.systems import DOUBLE, INVERSE, MATRIX, B, spd


def test_inverse_of_the_reference_matrix() -> None:
    for i in range(3):
        unit = (torch.eye(3, dtype=DOUBLE)[i],)
        for solver in (
            ConjugateGradient(tolerance=1e-14),
            Neumann(num_terms=500, step_size=0.3),
            DenseSolve(),
        ):
            x = solver.solve(as_operator(MATRIX, unit), unit).x[0]
            torch.testing.assert_close(x, INVERSE[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (2, 5), ()])
def test_solvers_agree_on_tuples(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    like = (torch.zeros(shape, dtype=DOUBLE), torch.zeros(3, 2, dtype=DOUBLE))
    n = sum(t.numel() for t in like)
    matrix = spd(n, 10.0, generator)
    b = tuple(torch.randn(t.shape, dtype=DOUBLE, generator=generator) for t in like)
    operator = as_operator(matrix, b)
    truth = torch.linalg.solve(matrix, torch.cat([t.flatten() for t in b]))
    for solver in (
        ConjugateGradient(max_iterations=100, tolerance=1e-13),
        ConjugateGradient(
            max_iterations=100, tolerance=1e-13, preconditioner=torch.diag(1 / matrix.diagonal())
        ),
        Neumann(num_terms=2000),
        Nystrom(rank=n, damping=0.0),
        DenseSolve(),
    ):
        solution = solver.solve(operator, b)
        assert [t.shape for t in solution.x] == [t.shape for t in b]
        torch.testing.assert_close(torch.cat([t.flatten() for t in solution.x]), truth, rtol=1e-9, atol=1e-9)
        assert solution.residual < 1e-8
        assert solution.curvature > 0


@pytest.mark.parametrize("solver", [Nystrom(rank=8, damping=0.5), DenseSolve(damping=0.5)])
def test_factorisations_of_half_precision_are_made_in_float32(
    solver: InverseSolver, generator: torch.Generator
) -> None:
    half, n = torch.bfloat16, 8
    matrix = spd(n, 4.0, generator)
    b = torch.randn(n, generator=generator, dtype=DOUBLE)
    truth = torch.linalg.solve(matrix + 0.5 * torch.eye(n, dtype=DOUBLE), b)
    solution = solver.solve(as_operator(matrix.to(half), (b.to(half),)), (b.to(half),))
    assert solution.x[0].dtype == half
    assert solution.status != "negative_curvature"
    # Products are off by n·eps/2 at most, amplified by the condition of A + damping, 1.5/0.75.
    error = torch.linalg.vector_norm(solution.x[0].double() - truth) / torch.linalg.vector_norm(truth)
    assert float(error) < 2 * n * torch.finfo(half).eps / 2
    assert solution.residual < 2 * n * torch.finfo(half).eps


@pytest.mark.parametrize(
    "solver", [Neumann(num_terms=3), ConjugateGradient(), Nystrom(rank=2), DenseSolve(), Identity()]
)
def test_zero_right_hand_side(solver: InverseSolver) -> None:
    zero = (torch.zeros(3, dtype=DOUBLE),)
    solution = solver.solve(as_operator(MATRIX, zero), zero)
    assert solution.x[0].tolist() == [0.0, 0.0, 0.0]
    assert solution.residual == 0.0
    assert solution.iterations == 0
    assert solution.status == "converged"


@pytest.mark.parametrize("solver", [Neumann(num_terms=3, step_size=0.5), ConjugateGradient(), DenseSolve()])
def test_one_step_convergence_is_finite(solver: InverseSolver) -> None:
    solution = solver.solve(DiagonalOperator(2.0), B)
    torch.testing.assert_close(solution.x[0], B[0] / 2, rtol=1e-15, atol=0)
    assert solution.residual == pytest.approx(0.0, abs=1e-15)


INDEFINITE = torch.diag(torch.tensor([2.0, 1.0, -0.5], dtype=DOUBLE))


def test_negative_curvature_is_reported_by_every_solver() -> None:
    operator = as_operator(INDEFINITE, B)
    solution = Neumann(num_terms=200, step_size=0.4).solve(operator, B)
    assert solution.status == "negative_curvature"  # the quotient of a mixed term may still be positive
    assert math.isfinite(float(solution.x[0].norm()))
    assert Neumann(num_terms=200).solve(operator, B).status == "negative_curvature"
    start = (torch.tensor([3.0, 1.0, 0.5], dtype=DOUBLE),)
    solution = ConjugateGradient().solve(operator, start)
    assert solution.status == "negative_curvature"
    assert solution.curvature < 0
    with pytest.raises(FloatingPointError, match="first direction"):
        ConjugateGradient().solve(operator, (torch.tensor([0.0, 0.0, 1.0], dtype=DOUBLE),))
    assert DenseSolve().solve(operator, B).status == "negative_curvature"
    assert Nystrom(rank=3, damping=0.1).solve(operator, B).status == "negative_curvature"
    damped = ConjugateGradient(damping=1.0).solve(operator, B)
    assert damped.status == "converged"
    torch.testing.assert_close(damped.x[0], B[0] / torch.tensor([3.0, 2.0, 0.5], dtype=DOUBLE))


@pytest.mark.parametrize(
    "solver",
    [
        Neumann(num_terms=3),
        Neumann(num_terms=3, step_size=0.1),
        ConjugateGradient(),
        Nystrom(rank=2),
        DenseSolve(),
    ],
)
def test_non_finite_products_raise(solver: InverseSolver) -> None:
    broken = as_operator(MATRIX * float("nan"), B)
    with pytest.raises(FloatingPointError, match=r"finite|positive definite"):
        solver.solve(broken, B)
    with pytest.raises(FloatingPointError, match="finite"):
        solver.solve(as_operator(MATRIX, B), (B[0] * float("inf"),))


@pytest.mark.parametrize(
    "solver",
    [
        Neumann(num_terms=40, step_size=1.0, warm_start=True, tolerance=1e-10),
        ConjugateGradient(max_iterations=200, tolerance=1e-10, warm_start=True),
    ],
)
def test_warm_start_saves_products_and_keeps_the_answer(solver: InverseSolver) -> None:
    generator = torch.Generator().manual_seed(5)
    matrix = spd(60, 20.0, generator)
    b = (torch.randn(60, dtype=DOUBLE, generator=generator),)
    operator, truth = as_operator(matrix, b), torch.linalg.solve(matrix, b[0])
    state = SolverState()
    errors = []
    for _ in range(12):
        solution = solver.solve(operator, b, state=state)
        state = solution.state
        errors.append(float((solution.x[0] - truth).norm() / truth.norm()))
    assert errors[-1] < 1e-8
    assert solution.iterations <= 2
    assert errors == sorted(errors, reverse=True) or errors[1] < 1e-8


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Neumann(num_terms=-1), "num_terms"),
        (lambda: Neumann(step_size=0.0), "step_size"),
        (lambda: ConjugateGradient(max_iterations=0), "max_iterations"),
        (lambda: ConjugateGradient(damping=-1.0), "damping"),
        (lambda: Nystrom(rank=0), "rank"),
        (lambda: DenseSolve(damping=-1.0), "damping"),
    ],
)
def test_options_out_of_range(make, name: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=name):
        make()


def test_the_global_random_stream_is_untouched() -> None:
    before = torch.get_rng_state()
    Neumann(num_terms=2).solve(as_operator(MATRIX, B), B)
    Nystrom(rank=2).solve(as_operator(MATRIX, B), B)
    assert torch.equal(before, torch.get_rng_state())
