"""Alignment of the first frame of a training run."""

from __future__ import annotations

import torch

from lightning_nested.dynamics import TrainingTracker
from tests.cases import DOUBLE


def test_lanczos_aligns_the_frame_with_the_least_curvature() -> None:
    torch.manual_seed(0)
    curvature = torch.linspace(-0.5, 2.0, 200, dtype=DOUBLE)
    w = torch.randn(200, dtype=DOUBLE).requires_grad_(True)
    loss = 0.5 * (curvature * w * w).sum()
    aligned, random = (TrainingTracker([w], k=2, align=a) for a in (80, 0))
    optimizer = torch.optim.SGD([w], lr=0.1)
    for tracker in (aligned, random):
        tracker.observe(loss, lr=0.1)
        w.grad = (curvature * w).detach()
        assert tracker.advance(optimizer)
    assert aligned.alignment > 0.99
    exact = torch.log(1 - 0.1 * curvature[:2])
    torch.testing.assert_close(aligned.running(), exact, rtol=0, atol=1e-4)
    assert float(random.running()[0]) < float(exact[0]) - 0.05
