"""Forecast: the weights that a training is heading to, and the inverses that it gives to solvers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nested.hypergradient import LookAhead
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.linalg.kronecker import KroneckerFisher
from lightning_nested.optim.step_dynamics import decay_factors
from lightning_nested.trainer.forecast import Forecast
from tests.cases import DOUBLE
from tests.conftest import Normal


class Run:
    """A linear regression with a tuned decay of 0.2, at one inner step before an outer one."""

    def __init__(self, normal: Normal, optimizer: Any = torch.optim.SGD, **options: Any) -> None:
        self.net, self.x, self.y = nn.Linear(3, 1, dtype=DOUBLE), normal(8, 3), normal(8, 1)
        self.parameters = dict(self.net.named_parameters())
        self.optimizer = optimizer(self.net.parameters(), lr=0.1)
        decay = WeightDecay(init=0.2)
        decay.build(self.parameters)
        self.forecast = Forecast(
            self.net, self.parameters, self.optimizer, [decay], point=LookAhead(**options)
        )
        self.forecast.remaining = 50.0
        self.forecast.watch(1)
        self.loss().backward()
        self.forecast.gradient(1)

    def loss(self) -> Tensor:
        loss: Tensor = 0.5 * ((self.net(self.x) - self.y) ** 2).mean()
        return loss

    def penalty(self, weight: Tensor) -> float:
        return float(0.1 * weight.square().sum())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_prediction_is_the_damped_step_within_reach(optimizer: Any, normal: Normal) -> None:
    """z = (F + D + 1/(R·t))⁻¹m; before its first step AdamW has R = lr, too, and m the pull of its decay."""
    run = Run(normal, optimizer, max_radius=1.0, start_radius=1.0)
    w = [p.detach().clone() for p in run.net.parameters()]
    m = [p.grad.clone() for p in run.net.parameters()]  # type: ignore[union-attr]
    # λ/R·lr is λ itself
    if optimizer is torch.optim.AdamW:
        m[0] += 0.2 * w[0]
    twin = KroneckerFisher(run.net, run.parameters)
    twin.load_state_dict(run.forecast.fisher.state_dict())
    z = twin.inverse([0.2 + 10 / 50, 10 / 50]) @ tuple(m)
    shares = [min(1.0, float(a.norm() / b.norm())) for a, b in zip(w, z, strict=True)]
    expected = [a - share * b for a, share, b in zip(w, shares, z, strict=True)]

    seen: list[list[Tensor]] = []

    def evaluate() -> float:
        seen.append([p.detach().clone() for p in run.net.parameters()])
        return -math.inf

    found = run.forecast.weights(0.0, evaluate, None)
    for a, b, c in zip(found, expected, seen[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert torch.equal(a, c)
    assert all(torch.equal(p, a) for p, a in zip(run.net.parameters(), w, strict=True))


def test_the_radius_follows_the_regularized_loss(normal: Normal) -> None:
    """The loss rises a little, and the penalty falls more, or less."""
    for share, fell in ((0.9, True), (1.1, False)):
        run = Run(normal)
        before = run.net.weight.detach().clone()

        def evaluate(run: Run = run, before: Tensor = before, share: float = share) -> float:
            return share * (run.penalty(before) - run.penalty(run.net.weight.detach()))

        moved = run.forecast.weights(0.0, evaluate, None)
        assert run.penalty(moved[0]) != run.penalty(before)
        # Where the penalty rises, a rise of the loss against it is a fall.
        fell = fell if run.penalty(moved[0]) < run.penalty(before) else not fell
        assert run.forecast.radius == pytest.approx(0.15 if fell else 0.05)
        length = float((moved[0] - before).norm() / before.norm())
        assert length <= (0.1 if fell else 0.05) + 1e-12


def test_a_step_that_cannot_be_evaluated_again_leaves_the_radius(normal: Normal) -> None:
    run = Run(normal)
    moved = run.forecast.weights(0.0, lambda: math.nan, None)
    assert run.forecast.radius == 0.1
    assert not torch.equal(moved[0], run.net.weight)


def test_without_a_gradient_nothing_is_predicted(normal: Normal) -> None:
    run = Run(normal)
    run.forecast._mean = None
    assert torch.equal(run.forecast.weights(0.0, lambda: 0.0, None)[0], run.net.weight)


def test_a_gradient_that_is_not_finite_is_forgotten(normal: Normal) -> None:
    run = Run(normal)
    run.net.weight.grad.fill_(math.inf)  # type: ignore[union-attr]
    run.forecast.gradient(3)
    with pytest.raises(FloatingPointError, match="mean of the inner gradient"):
        run.forecast.weights(0.0, lambda: 0.0, None)
    run.net.weight.grad.fill_(1.0)  # type: ignore[union-attr]
    run.forecast.gradient(3)
    assert not torch.equal(run.forecast.weights(0.0, lambda: -1.0, None)[0], run.net.weight)


def test_the_mean_gradient_has_every_second_step_of_the_last_twenty(normal: Normal) -> None:
    run = Run(normal)
    start = run.forecast._mean[0].clone()  # type: ignore[index]
    run.net.weight.grad = torch.ones_like(run.net.weight)
    for ahead in (22, 21, 20, 10**9):
        run.forecast.gradient(ahead)
    assert torch.equal(run.forecast._mean[0], start)  # type: ignore[index]
    run.net.weight.grad *= 8.0
    run.forecast.gradient(19, scale=8.0)
    torch.testing.assert_close(run.forecast._mean[0], (start + 1) / 2)  # type: ignore[index]


def test_each_damping_has_its_inverse_until_the_next_factorization(normal: Normal) -> None:
    run = Run(normal, refresh_every=2)
    v = tuple(normal(*p.shape) for p in run.net.parameters())
    forecast = run.forecast
    forecast.count()
    by_length, given = forecast.kronecker_inverse() @ v, forecast.kronecker_inverse(3.0) @ v
    twin = KroneckerFisher(run.net, run.parameters)
    twin.load_state_dict(forecast.fisher.state_dict())
    for found, damping in ((by_length, 0.2), (given, 3.0)):
        for a, b in zip(found, twin.inverse([0.2 + damping, damping]) @ v, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    forecast.remaining = 20.0
    forecast.count()
    assert torch.equal((forecast.kronecker_inverse() @ v)[0], by_length[0])
    assert torch.equal((forecast.kronecker_inverse(3.0) @ v)[0], given[0])
    forecast.count()
    assert not torch.equal((forecast.kronecker_inverse() @ v)[0], by_length[0])


def test_the_diagonal_inverse_has_the_optimizers_step_and_the_decay(normal: Normal) -> None:
    run = Run(normal)
    v = tuple(normal(*p.shape) for p in run.net.parameters())
    weight, bias = run.forecast.diagonal_inverse() @ v
    torch.testing.assert_close(weight, v[0] / (0.2 + 10 / 50))
    torch.testing.assert_close(bias, v[1] / (10 / 50))
    weight, bias = run.forecast.diagonal_inverse(0.5) @ v
    torch.testing.assert_close(weight, v[0] / (0.2 + 0.5))
    torch.testing.assert_close(bias, v[1] / 0.5)


def test_factors_of_decoupled_decays_hold_for_one_outer_step(normal: Normal) -> None:
    run = Run(normal, torch.optim.AdamW)
    run.forecast.count()
    run.optimizer.step()
    first = run.forecast.decay_factors()
    run.optimizer.step()
    assert run.forecast.decay_factors() is first
    run.forecast.count()
    expected = decay_factors(run.optimizer, run.parameters)
    assert all(torch.equal(run.forecast.decay_factors()[name], x) for name, x in expected.items())
    assert not torch.equal(first["weight"], expected["weight"])


def test_the_state_of_other_parameters_is_told_apart(normal: Normal) -> None:
    run = Run(normal)
    state = run.forecast.state_dict()
    assert run.forecast.is_of(state)
    assert not run.forecast.is_of({**state, "names": ["weight"]})
    assert not run.forecast.is_of(None)
