"""Momenta near the current ones, from eigenvalues and from joint steps."""

from __future__ import annotations

import numpy as np
import torch

from lightning_nested.games import convergence_rate
from lightning_nested.games.adaptation import better_momenta, better_momentum
from lightning_nested.games.joint_step import JointStep
from lightning_nested.optim.update_rules import Momentum


def test_directions_that_run_away_do_not_hide_the_others() -> None:
    """Beside a direction of negative curvature the turning ones are adapted as without it."""
    now = {i: Momentum("momentum", 0.8, 0.0) for i in range(2)}
    turn, whole, beta = np.array([[0.0, 0.1], [-0.1, 0.0]]), np.zeros((3, 3)), np.full(3, 0.8)
    whole[:2, :2], whole[2, 2] = turn, -0.05
    alone = JointStep(matrix=turn, sizes=(1, 1), steps=None, momentum=beta[:2], phase=0 * beta[:2])
    beside = JointStep(matrix=whole, sizes=(1, 2), steps=None, momentum=beta, phase=0 * beta)
    assert better_momenta(beside, now) == better_momenta(alone, now) != now
    away = JointStep(matrix=-np.eye(2), sizes=(1, 1), steps=None, momentum=beta[:2], phase=beta[:2])
    assert better_momenta(away, now) == now


def test_better_momentum_leaves_alone_what_it_cannot_help() -> None:
    now = Momentum("momentum", 0.5, 0.3)
    assert better_momentum(torch.tensor([-0.1 + 0j]), now) == now  # repelled whatever the momentum
    some = torch.tensor([-0.1 + 0j, 0.1j, -0.1j])
    better = better_momentum(some, now)
    worst = [convergence_rate([0.1j], lr=1.0, momentum=m.momentum, phase=m.phase) for m in (now, better)]
    assert worst[1] < worst[0] - 1e-3
    assert better_momentum(some, better, max_change=(0.0, 0.0)) == better


def test_a_momentum_above_the_bound_comes_down_by_no_more_than_max_change() -> None:
    for now, lowest in ((Momentum("momentum", 0.99, 0.0), 0.98), (Momentum("momentum", 0.96, 0.0), 0.95)):
        # λ = 1 wants far less momentum.
        better = better_momentum(torch.tensor([1.0 + 0j]), now, max_momentum=0.95, max_change=(0.01, 0.1))
        assert lowest - 1e-12 <= better.momentum <= now.momentum
        assert better.phase <= 0.1 + 1e-12
        assert better != now
