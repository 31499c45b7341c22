"""The Neumann series: its values, its rate, and the step size that it measures."""

from __future__ import annotations

import pytest
import torch

from lightning_nested.hypergradient import (
    Neumann,
)
from lightning_nested.linalg.operators import DiagonalOperator, as_operator
from tests.linalg.solvers.systems import DOUBLE, INVERSE, MATRIX, B, spd


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


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("num_terms", [1, 4])
def test_solutions_have_no_graph(num_terms: int) -> None:
    b = (B[0].clone().requires_grad_(True) * 2,)
    (x,) = Neumann(num_terms=num_terms, step_size=0.3).solve(as_operator(MATRIX, B), b).x
    assert not x.requires_grad
