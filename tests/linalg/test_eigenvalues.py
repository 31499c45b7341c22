"""Leading eigenvalues of matrices by products alone, and each way to fail."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_nested.linalg.eigenvalues import SpectrumError, Which, leading_eigenvalues
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.vectors import Vector
from tests.linalg.spectra import KEYS, WHICH, closest


class Matrix(LinearOperator):
    """A given matrix, which counts its products."""

    symmetric = False

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.like, self.count = matrix, (torch.zeros(len(matrix), dtype=matrix.dtype),), 0

    def matvec(self, v: Vector) -> Vector:
        self.count += 1
        return (self.matrix @ v[0],)


@pytest.mark.parametrize("which", WHICH)
def test_random_matrix(which: Which) -> None:
    matrix = torch.randn(120, 120, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    operator = Matrix(matrix)
    found = leading_eigenvalues(operator, 5, which)
    assert found.num_products == operator.count
    wanted = sorted(np.linalg.eigvals(matrix.numpy()).tolist(), key=KEYS[which])
    assert closest(found.eigenvalues, wanted[: len(found.eigenvalues)]) < 1e-8 * 12


def test_zero_operator() -> None:
    found = leading_eigenvalues(Matrix(torch.zeros(50, 50, dtype=torch.float64)), 2)
    assert found.eigenvalues.tolist() == [0, 0]
    assert found.residuals.tolist() == [0, 0]


def test_no_convergence() -> None:
    # A shift by one place around a circle: all eigenvalues have modulus 1, and none leads.
    matrix = torch.roll(torch.eye(400, dtype=torch.float64), 1, dims=0)
    with pytest.raises(
        SpectrumError, match=r"must converge within max_products=60\. Got 0 of them"
    ) as caught:
        leading_eigenvalues(Matrix(matrix), 6, max_products=60)
    assert caught.value.num_products >= 20
    assert caught.value.eigenvalues.dtype == torch.complex128


def test_products_that_are_not_finite() -> None:
    for k in (None, 2):
        with pytest.raises(FloatingPointError, match="must be finite"):
            leading_eigenvalues(Matrix(torch.full((40, 40), torch.nan, dtype=torch.float64)), k)


def test_all_of_a_large_game() -> None:
    with pytest.raises(ValueError, match=r"All eigenvalues need n <= 4096\. Got n=5000; give k"):
        leading_eigenvalues(Matrix(torch.zeros(5000, 1)), None)
