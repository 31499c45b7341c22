"""Derivatives of the outer loss at a factor, in one pass through its graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
