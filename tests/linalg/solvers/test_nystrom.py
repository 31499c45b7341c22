"""The Nyström inverse on a matrix of low rank."""

from __future__ import annotations

import torch

from lightning_nested.hypergradient import (
    Nystrom,
)
from lightning_nested.linalg.operators import as_operator
from tests.linalg.solvers.systems import DOUBLE


def test_nystrom_is_exact_on_low_rank_and_damped_elsewhere() -> None:
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(30, 4, dtype=DOUBLE, generator=generator)
    matrix = factor @ factor.T
    b = (torch.randn(30, dtype=DOUBLE, generator=generator),)
    solution = Nystrom(rank=6, damping=0.1).solve(as_operator(matrix, b), b)
    truth = torch.linalg.solve(matrix + 0.1 * torch.eye(30, dtype=DOUBLE), b[0])
    torch.testing.assert_close(solution.x[0], truth, rtol=1e-8, atol=1e-8)
    assert solution.residual < 1e-8
