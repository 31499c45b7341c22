"""Matrices that the dense solver refuses."""

from __future__ import annotations

import pytest
import torch

from lightning_nested.hypergradient import (
    DenseSolve,
)
from lightning_nested.linalg.operators import DiagonalOperator, as_operator
from tests.linalg.solvers.systems import DOUBLE, MATRIX, B


def test_singular_matrix_raises_in_the_dense_solver() -> None:
    with pytest.raises(FloatingPointError, match="singular"):
        DenseSolve().solve(DiagonalOperator([torch.tensor([1.0, 0.0, 1.0], dtype=DOUBLE)]), B)
    with pytest.raises(ValueError, match="max_size"):
        DenseSolve(max_size=2).solve(as_operator(MATRIX, B), B)
