"""Momentum, scale and sign of an optimizer's next step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nested.optim import (
    ComplexSGD,
)
from lightning_nested.optim.step_dynamics import step_dynamics


def test_step_dynamics_of_groups_that_differ() -> None:
    a, b = (nn.Parameter(torch.ones(n)) for n in (1, 2))
    groups = [{"params": [a], "phase": 0.1}, {"params": [b], "lr": 0.5}]
    found = step_dynamics(ComplexSGD(groups, lr=0.2), [a, b])
    assert found.momentum is None
    assert [d.tolist() for d in found.scale] == [pytest.approx([0.2]), [0.5, 0.5]]


def test_groups_that_ascend_and_descend_are_refused() -> None:
    a, b = (nn.Parameter(torch.ones(n)) for n in (1, 2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "maximize": True}], lr=0.1)
    assert step_dynamics(optimizer, [b]).sign == -1
    with pytest.raises(ValueError, match="must have the same maximize"):
        step_dynamics(optimizer, [a, b])
