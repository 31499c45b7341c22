"""Solvers on matrices: values, rates, reports, and each way to fail."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

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

DOUBLE = torch.float64
MATRIX = torch.tensor([[5.0, 1.0, 1.0], [1.0, 4.0, 1.0], [1.0, 1.0, 3.0]], dtype=DOUBLE)
INVERSE = torch.tensor([[0.22, -0.04, -0.06], [-0.04, 0.28, -0.08], [-0.06, -0.08, 0.38]], dtype=DOUBLE)
B = (torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE),)


def spd(n: int, condition: float, generator: torch.Generator) -> Tensor:
    """A symmetric matrix with eigenvalues from 1/condition to 1, evenly spaced in the logarithm."""
    q = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE, generator=generator))[0]
    return q @ torch.diag(torch.logspace(0, -math.log10(condition), n, dtype=DOUBLE)) @ q.T


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


def test_neumann_reference_row() -> None:
    operator, truth = as_operator(MATRIX, B), INVERSE @ B[0]
    short = Neumann(num_terms=20, step_size=0.3).solve(operator, B)
    long = Neumann(num_terms=100, step_size=0.3).solve(operator, B)
    assert not torch.allclose(short.x[0], truth, rtol=1e-3)
    assert torch.allclose(long.x[0], truth, rtol=1e-3)
    assert short.iterations == 20
    assert short.status == "truncated"
    with pytest.raises(FloatingPointError, match="step_size"):
        Neumann(num_terms=20, step_size=1.0).solve(operator, B)


def test_neumann_error_falls_as_the_theory_says() -> None:
    """Along an eigenvalue μ the error is (1 − αμ)^{K+1}."""
    diagonal = torch.tensor([1.0, 0.25, 0.05], dtype=DOUBLE)
    for terms in (0, 1, 5, 30):
        x = Neumann(num_terms=terms, step_size=0.9).solve(DiagonalOperator([diagonal]), B).x[0]
        error = 1 - x * diagonal / B[0]
        torch.testing.assert_close(error, (1 - 0.9 * diagonal) ** (terms + 1), rtol=1e-12, atol=1e-14)


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


def test_nystrom_is_exact_on_low_rank_and_damped_elsewhere() -> None:
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(30, 4, dtype=DOUBLE, generator=generator)
    matrix = factor @ factor.T
    b = (torch.randn(30, dtype=DOUBLE, generator=generator),)
    solution = Nystrom(rank=6, damping=0.1).solve(as_operator(matrix, b), b)
    truth = torch.linalg.solve(matrix + 0.1 * torch.eye(30, dtype=DOUBLE), b[0])
    torch.testing.assert_close(solution.x[0], truth, rtol=1e-8, atol=1e-8)
    assert solution.residual < 1e-8


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


def test_nystrom_as_preconditioner_saves_products() -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = spd(100, 1e4, generator) + 1e-3 * torch.eye(100, dtype=DOUBLE)
    b = (torch.randn(100, dtype=DOUBLE, generator=generator),)
    operator = as_operator(matrix, b)
    plain = ConjugateGradient(max_iterations=500, tolerance=1e-8)
    inverse = Nystrom(rank=50, damping=1e-3).factor(operator, b)
    helped = ConjugateGradient(max_iterations=500, tolerance=1e-8, preconditioner=inverse)
    assert helped.solve(operator, b).iterations < plain.solve(operator, b).iterations / 2


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


def test_singular_matrix_raises_in_the_dense_solver() -> None:
    with pytest.raises(FloatingPointError, match="singular"):
        DenseSolve().solve(DiagonalOperator([torch.tensor([1.0, 0.0, 1.0], dtype=DOUBLE)]), B)
    with pytest.raises(ValueError, match="max_size"):
        DenseSolve(max_size=2).solve(as_operator(MATRIX, B), B)


def test_measured_step_size_halves_when_the_curvature_rises() -> None:
    """A warm eigenvector of an old, softer matrix must not make the series diverge on a new, stiffer one."""
    solver = Neumann(num_terms=50)
    state = solver.solve(DiagonalOperator([torch.tensor([1.0, 0.5, 0.2], dtype=DOUBLE)]), B).state
    stiff = torch.tensor([0.1, 40.0, 0.2], dtype=DOUBLE)
    solution = solver.solve(DiagonalOperator([stiff]), B, state=state)
    assert solution.status in ("truncated", "converged")
    assert solution.residual < 1.0


def test_power_iteration_continues_between_solves() -> None:
    generator = torch.Generator().manual_seed(4)
    matrix = spd(50, 100.0, generator)
    b = (torch.randn(50, dtype=DOUBLE, generator=generator),)
    solver = Neumann(num_terms=5)
    first = solver.solve(as_operator(matrix, b), b)
    state, count = first.state, first.iterations
    for _ in range(30):
        solution = solver.solve(as_operator(matrix, b), b, state=state)
        state = solution.state
        assert solution.iterations == 6  # five terms and one power step
    assert count > 6
    assert state.eigenvalue == pytest.approx(1.0, rel=0.02)


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


def test_warm_start_from_a_far_solution_is_dropped() -> None:
    solver = ConjugateGradient(tolerance=1e-12, warm_start=True)
    state = SolverState(solution=(1e6 * torch.ones(3, dtype=DOUBLE),))
    solution = solver.solve(as_operator(MATRIX, B), B, state=state)
    torch.testing.assert_close(solution.x[0], INVERSE @ B[0], rtol=1e-12, atol=1e-14)


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
