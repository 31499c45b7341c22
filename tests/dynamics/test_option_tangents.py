"""Derivatives of a run by its optimizer's options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_nested.dynamics.option_tangents import OptionTangents


def one() -> Tensor:
    return torch.ones(1, dtype=torch.float64)


def test_one_step_on_a_parabola() -> None:
    w = nn.Parameter(one())
    optimizer, tangents = torch.optim.SGD([w], lr=0.1), OptionTangents([w], k=1)
    assert tangents.along((w.detach(),)).tolist() == [0.0]
    (0.5 * w**2).sum().backward()
    tangents.advance(optimizer, [{"lr": one()}])
    optimizer.step()
    # L = ½w², w = 1 − α: dL/dα = −(1 − α).
    assert tangents.along((w.detach(),)).item() == pytest.approx(-0.9, rel=1e-15)


def test_three_steps_on_a_parabola() -> None:
    w = nn.Parameter(one())
    optimizer, tangents = torch.optim.SGD([w], lr=0.1), OptionTangents([w], k=1)
    for _ in range(3):
        loss = (0.5 * w**2).sum()
        tangents.observe(loss)
        optimizer.zero_grad()
        loss.backward()
        tangents.advance(optimizer, [{"lr": one()}])
        optimizer.step()
    # w = (1 − α)³.
    assert tangents.along((one(),)).item() == pytest.approx(-3 * 0.9**2, rel=1e-14)
    tangents.clear()
    assert tangents.along((one(),)).item() == 0.0


def test_a_later_step_needs_the_losses() -> None:
    w = nn.Parameter(one())
    optimizer, tangents = torch.optim.SGD([w], lr=0.1), OptionTangents([w], k=1)
    for missing in (False, True):
        optimizer.zero_grad()
        (0.5 * w**2).sum().backward()
        if missing:
            with pytest.raises(RuntimeError, match=r"Got none; call observe\(loss\) before"):
                tangents.advance(optimizer, [{"lr": one()}])
        else:
            tangents.advance(optimizer, [{"lr": one()}])


def test_a_step_without_gradients_moves_nothing() -> None:
    w = nn.Parameter(one())
    tangents = OptionTangents([w], k=1)
    tangents.advance(torch.optim.SGD([w], lr=0.1), [{"lr": one()}])
    assert not tangents.needs_losses


def test_what_is_not_finite_is_reported() -> None:
    w = nn.Parameter(one())
    w.grad = torch.full_like(w, torch.inf)
    with pytest.raises(FloatingPointError, match="must be finite"):
        OptionTangents([w], k=1).advance(torch.optim.SGD([w], lr=0.1), [{"lr": one()}])
