"""Mixed derivatives by differences, where the change of ∂f/∂λ is lost in its rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_nested.hypergradient.inner_curvature import FiniteDifference, Hessian


def linearized(dtype: torch.dtype, values: list[float]) -> tuple[Tensor, float]:
    """Return vᵀ ∂²f/∂w∂λ of a small network with ½ λ ‖w‖² in its loss, and ∂f/∂λ; v is nearly orthogonal to w."""
    draw = torch.Generator().manual_seed(0)
    x, y, w, u, v = (torch.randn(*s, generator=draw) for s in ((20, 6), (20, 1), (10, 6), (10, 1), (10, 6)))
    w *= 7.5
    v -= (v * w).sum() / (w * w).sum() * w
    v += 0.02 * w / (w * w).sum() * v.norm()
    x, y, w, u, v = (a.to(dtype) for a in (x, y, w, u, v))
    decay = torch.tensor(values, dtype=dtype, requires_grad=True)
    w.requires_grad_(True)

    def loss() -> Tensor:
        squares = 0.5 * (w**2).sum()
        return ((torch.tanh(x @ w.T / 40) @ u - y) ** 2).mean() + (decay * squares).sum()

    curvature = FiniteDifference() if dtype == torch.float32 else Hessian()
    linear = curvature.linearize(loss if dtype == torch.float32 else loss(), (w,))
    (product,) = linear.mixed((v,), (decay,))
    assert product is not None
    assert decay.detach().equal(torch.tensor(values, dtype=dtype))
    return product.double(), float(v.norm())


@pytest.mark.parametrize("values", [[1e-4], [0.0], [1e-4, 1e-2, 1e-3]])
def test_a_change_below_rounding_is_taken_along_the_hyperparameter(values: list[float]) -> None:
    found, size = linearized(torch.float32, values)
    truth, _ = linearized(torch.float64, values)
    assert float(truth[0]) == pytest.approx(0.02 * size, rel=0.01)
    torch.testing.assert_close(found, truth, rtol=0.02, atol=0.0)


def test_many_entries_below_rounding_warn() -> None:
    decay = torch.full((50,), 1e-4, requires_grad=True)
    w = torch.full((50,), 60.0, requires_grad=True)
    linear = FiniteDifference(epsilon=1e-9).linearize(lambda: (0.5 * decay * w**2).sum(), (w,))
    with pytest.warns(RuntimeWarning, match="hyperparameter 0.*below rounding"):
        linear.mixed((torch.ones(50),), (decay,))
