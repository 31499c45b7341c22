"""Every solver in storms of NaN, infinity and overflow: it answers in finite numbers, or raises FloatingPointError."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_nested.hypergradient import (
    ConjugateGradient,
    DenseSolve,
    GivenInverse,
    Identity,
    InverseSolver,
    LinearOperator,
    Neumann,
    Nystrom,
    SolverState,
)
from lightning_nested.linalg.finite import check_finite, check_matrix
from lightning_nested.linalg.vectors import Vector
from tests.linalg.solvers.systems import spd

N = 6
SOLVERS = {
    "conjugate gradient": ConjugateGradient(),
    "conjugate gradient, warm and preconditioned": ConjugateGradient(
        warm_start=True, preconditioner=2 * torch.eye(N)
    ),
    "dense": DenseSolve(),
    "given": GivenInverse(inverse=torch.eye(N)),
    "identity": Identity(),
    "Neumann, measured step": Neumann(),
    "Neumann, given step, warm": Neumann(step_size=0.5, warm_start=True),
    "Nyström": Nystrom(rank=4),
    "Nyström of full rank": Nystrom(rank=N, damping=0.0),
}
WORST = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 3e38, "-huge": -3e38}


class Storm(LinearOperator):
    """Products of a good matrix, with a bad number in one entry from a given product on."""

    def __init__(self, bad: float, entry: int, first: int, generator: torch.Generator) -> None:
        self.matrix = spd(N, 10.0, generator).float()
        self.bad, self.entry, self.calm = bad, entry, first

    def matvec(self, v: Vector) -> Vector:
        product = self.matrix @ v[0]
        if self.calm <= 0:
            product[self.entry] = self.bad
        self.calm -= 1
        return (product,)


@pytest.mark.parametrize("name", SOLVERS)
def test_storms_end_in_finite_numbers_or_floating_point_errors(name: str) -> None:
    generator, refused = torch.Generator().manual_seed(0), 0
    solver: InverseSolver = SOLVERS[name]
    for bad, entry, first in itertools.product(WORST.values(), (0, N - 1), range(8)):
        operator = Storm(bad, entry, first, generator)
        b = (torch.randn(N, generator=generator),)
        state = SolverState(solution=(torch.randn(N, generator=generator),))
        try:
            x = solver.solve(operator, b, state=state).x
        except FloatingPointError:
            refused += 1
        else:
            assert torch.isfinite(x[0]).all(), (bad, entry, first)
    # Two solvers do not look at the operator.
    assert refused == 0 if isinstance(solver, GivenInverse | Identity) else refused > 20


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_right_hand_side_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    b = torch.ones(N)
    b[2] = bad
    operator = Storm(0.0, 0, 10**6, torch.Generator().manual_seed(0))
    with pytest.raises(FloatingPointError, match="right-hand side must be finite"):
        SOLVERS[name].solve(operator, (b,))


def test_lapack_receives_no_matrix_that_is_not_finite() -> None:
    good = np.eye(2)
    assert check_matrix(good, "It") is good
    for bad in (np.array([[1.0, np.nan]]), torch.tensor([[math.inf]]), np.array([[np.inf * 1j]])):
        with pytest.raises(FloatingPointError, match=r"It must be finite\. Got 1 of"):
            check_matrix(bad, "It")
    with pytest.raises(FloatingPointError, match=r"It must be finite\. Got nan"):
        check_finite(math.nan, "It")
