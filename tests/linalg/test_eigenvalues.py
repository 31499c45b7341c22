"""Leading eigenvalues of matrices by products alone, and each way to fail."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_nested.linalg import eigenvalues
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


def test_an_arpack_that_leaves_one_out_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those before SciPy 1.15 did, in a small subspace; here the second of the wanted ones."""
    solve = eigenvalues.sparse.eigs

    def forgetful(*args: object, k: int, ncv: int, **options: object) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = solve(*args, k=k + 1, ncv=ncv, **options)
        order = np.argsort(-abs(values))
        kept = order[:k] if ncv > 20 else np.delete(order, 1)
        return values[kept], vectors[:, kept]

    monkeypatch.setattr(eigenvalues.sparse, "eigs", forgetful)
    values = 0.5 ** torch.arange(200, dtype=torch.float64)
    operator = Matrix(torch.diag(values))
    monkeypatch.setattr(eigenvalues, "_MISSES", False)
    assert leading_eigenvalues(operator, 3).eigenvalues.real.tolist() == pytest.approx([1.0, 0.25, 0.125])
    monkeypatch.setattr(eigenvalues, "_MISSES", True)
    assert leading_eigenvalues(operator, 3).eigenvalues.real.tolist() == pytest.approx([1.0, 0.5, 0.25])
    # Too small for a second subspace: all of them.
    small = leading_eigenvalues(Matrix(torch.diag(values[:30])), 3)
    assert small.eigenvalues.real.tolist() == pytest.approx([1.0, 0.5, 0.25])


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
