"""Tangents beside a run: clipping against automatic differentiation, the history, what does not fit."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lightning_nested.dynamics import TrainingTracker
from lightning_nested.dynamics.frames import window_weights
from lightning_nested.dynamics.tangents import Clip
from tests.cases import DOUBLE
from tests.conftest import Normal


@pytest.mark.parametrize("limit", [0.1, 100.0])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_that_of_torch_with_its_derivative(
    limit: float, algorithm: Literal["norm", "value"], normal: Normal
) -> None:
    g, dg = normal(7), normal(3, 7)
    clip = Clip(limit=limit, algorithm=algorithm)
    p = torch.zeros(7, dtype=DOUBLE, requires_grad=True)
    p.grad = g.clone()
    if algorithm == "norm":
        torch.nn.utils.clip_grad_norm_([p], limit)
    else:
        torch.nn.utils.clip_grad_value_([p], limit)
    torch.testing.assert_close(clip.value(g), p.grad, rtol=1e-14, atol=0)

    def clipped(x: Tensor) -> Tensor:
        if algorithm == "value":
            return x.clamp(-limit, limit)
        return x * (limit / (x.norm() + 1e-6)).clamp(max=1.0)

    for row, pushed in zip(dg, clip.tangent(g, dg), strict=True):
        exact = torch.func.jvp(clipped, (g,), (row,))[1]
        torch.testing.assert_close(pushed, exact, rtol=1e-12, atol=1e-14)


def quadratic(rate: float, **options: Any) -> TrainingTracker:
    """200 steps on curvatures 1, 2, 3, more than the history holds at first."""
    w = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    curvature = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
    optimizer = torch.optim.SGD([w], lr=rate)
    tracker = TrainingTracker([w], k=2, **options)
    for _ in range(200):
        optimizer.zero_grad()
        loss = 0.5 * (curvature * w * w).sum()
        tracker.observe(loss, lr=rate)
        loss.backward()
        tracker.advance(optimizer)
        optimizer.step()
    return tracker


@pytest.mark.parametrize("window", ["uniform", "bump"])
def test_the_history_is_averaged(window: Literal["uniform", "bump"]) -> None:
    tracker = quadratic(0.1, align=0, window=window, orthonormalize_every=2)
    assert tracker.growth.shape == (100, 2)
    mean = window_weights(window, tracker.growth) @ tracker.growth / 2
    torch.testing.assert_close(tracker.running(), mean.sort(descending=True).values, rtol=1e-12, atol=0)
    exact = torch.tensor([0.9, 0.8], dtype=DOUBLE).log()
    error = float((tracker.running() - exact).abs().max())
    # From a random frame: a constant over T, unless the beginning has no weight.
    assert error < (1e-6 if window == "bump" else 0.02)
    assert error > (0.0 if window == "bump" else 1e-5)


def test_a_saved_state_goes_on_to_the_last_bit_and_must_fit() -> None:
    tracker = quadratic(0.1)
    w = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    copy = TrainingTracker([w], k=2)
    copy.load_state_dict(tracker.state_dict())
    assert torch.equal(copy.running(), tracker.running())
    other = TrainingTracker([torch.ones(4, dtype=DOUBLE, requires_grad=True)], k=2)
    with pytest.raises(ValueError, match=r"shape \(2, 4\)\. Got \(2, 3\); resume with the same k"):
        other.load_state_dict(tracker.state_dict())


def test_wrong_options_are_named() -> None:
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"window must be 'uniform' or 'bump'\. Got 'hann'"):
        TrainingTracker([w], window="hann")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"Got none; call observe\(loss\) before"):
        TrainingTracker([w]).advance(torch.optim.SGD([w], lr=0.1))
    tracker = TrainingTracker([w], align=3)
    with pytest.raises(FloatingPointError, match="first products must be finite"):
        tracker.observe((w.log() * float("nan")).sum() + (w**2).sum() * float("nan"))


def test_a_window_that_new_tangents_cut_begins_anew() -> None:
    w, u = (torch.ones(2, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    tracker = TrainingTracker([w], k=1, align=0, orthonormalize_every=4)
    for step in range(15):
        params = [w] if step < 6 else [w, u]
        if step == 6:
            tracker.follow(params)
        optimizer = torch.optim.SGD(params, lr=0.1)
        optimizer.zero_grad()
        loss = sum(((0.5 * p**2).sum() for p in params), torch.zeros((), dtype=DOUBLE))
        tracker.observe(loss, lr=0.1)
        loss.backward()
        tracker.advance(optimizer)
        optimizer.step()
        if step == 8:  # in the middle of a window
            tracker.load_state_dict(tracker.state_dict())
    assert len(tracker.growth) == 3
    torch.testing.assert_close(
        tracker.growth / 4, torch.full((3, 1), 0.9, dtype=DOUBLE).log(), rtol=0, atol=1e-12
    )
