"""Derivatives of the outer loss at a factor, in one pass through its graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_nested.linalg.first_derivatives import first_derivative
from lightning_nested.trainer.outer_loss import differentiated


@pytest.mark.parametrize(("scale", "times"), [(1.0, 1), (1024.0, 1), (1e300, 2)])
def test_a_factor_that_is_too_large_costs_another_evaluation(scale: float, times: int) -> None:
    """No graph is kept for that case, since those of compiled networks cannot be."""
    x = torch.tensor(1e200, dtype=torch.float64, requires_grad=True)
    evaluated = []

    def evaluate() -> Tensor:
        evaluated.append(x.sqrt() ** 2 * 3e10)
        return evaluated[-1]

    found = differentiated(evaluate(), (x,), scale, evaluate)
    assert len(evaluated) == times
    assert float(torch.autograd.grad(found, x)[0]) == pytest.approx(3e10, rel=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        evaluated[0].backward()


def test_derivatives_that_are_known_take_no_pass() -> None:
    x, y = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    loss = differentiated(x**2 * y, (x, y))
    known = first_derivative(loss, (x, y))
    assert [float(g) for g in known if g is not None] == [12.0, 9.0]
    assert first_derivative(loss, (x, y))[0] is known[0]
    # Of other tensors, in the graph.
    assert first_derivative(differentiated(x**2 * y, (x, y)), (y,))[0] == 9.0
