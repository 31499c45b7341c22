"""Derivatives of forward derivatives of linear solves and determinants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_nested.dynamics.maps import forward_derivative
from lightning_nested.dynamics.solves import DifferentiableSolves
from tests.cases import DOUBLE

B = torch.tensor([0.7, -1.1, 0.4], dtype=DOUBLE)
V = torch.tensor([0.3, 0.5, -0.8], dtype=DOUBLE)


def matrix(x: Tensor) -> Tensor:
    """Return an invertible matrix, not symmetric, that depends on x; rows are exchanged in its factorization."""
    shift = torch.tensor([[0.0, 0.1, 2.0], [3.0, 0.0, -0.2], [0.3, 2.5, 0.0]], dtype=DOUBLE)
    return shift + 0.3 * x.outer(x) + torch.diag(x**2)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "solve": lambda x: torch.linalg.solve(matrix(x), B * x),
    "solve, columns": lambda x: torch.linalg.solve(matrix(x), torch.stack([B * x, x], 1)),
    "solve, from the right": lambda x: torch.linalg.solve(matrix(x), torch.stack([B * x, x]), left=False),
    "solve_ex": lambda x: torch.linalg.solve_ex(matrix(x), B * x)[0],
    "tensorsolve": lambda x: torch.linalg.tensorsolve(matrix(x).reshape(3, 1, 3), (B * x).reshape(3, 1)),
    "tensorsolve, dims": lambda x: torch.linalg.tensorsolve(matrix(x)[:, None].mT, B * x, dims=(1,)),
    "det": lambda x: torch.linalg.det(matrix(x)),
    "det, by name": lambda x: torch.det(input=matrix(x)),
    "slogdet": lambda x: torch.linalg.slogdet(matrix(x)).logabsdet * matrix(x).slogdet().sign,
    "logdet": lambda x: torch.logdet(matrix(x) * matrix(x).det().detach().sign()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_derivatives_have_derivatives(name: str) -> None:
    function = FUNCTIONS[name]

    def along(x: Tensor) -> Tensor:
        """Return the derivative along V of the gradient, the shape that maps of optimizer steps have."""
        gradient = torch.func.grad(lambda y: (function(y) ** 2).sum())
        return forward_derivative(lambda y: (gradient(y),), (x,), (V,))[1][0].square().sum()

    x = torch.tensor([0.4, -0.6, 0.9], dtype=DOUBLE, requires_grad=True)
    with DifferentiableSolves():
        replaced = function(x)
    torch.testing.assert_close(replaced, function(x), rtol=1e-12, atol=1e-14)
    (found,) = torch.autograd.grad(along(x), x)
    h = 1e-5  # truncation 1e-10 and rounding 1e-11, relative
    with torch.no_grad():
        moves = h * torch.eye(3, dtype=DOUBLE)
        truth = torch.stack([(along(x + e) - along(x - e)) / (2 * h) for e in moves])
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-7)


def test_a_result_in_place_stays_torchs_own() -> None:
    out = torch.empty(3, dtype=DOUBLE)
    a = matrix(B)
    with DifferentiableSolves():
        assert torch.linalg.solve(a, B, out=out) is out
    torch.testing.assert_close(a @ out, B)
