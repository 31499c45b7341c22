"""The νPI controller against what it generalizes, its sum, and the oscillation that it damps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.games import ConstrainedLoss
from lightning_nested.modules import AugmentedLagrangian
from lightning_nested.optim import NuPI, OptimisticSGD
from tests.cases import DOUBLE
from tests.trainers import trainer


def path(make: Callable[[list[Tensor]], Optimizer], steps: int = 8) -> Tensor:
    """Parameters after each step, with gradients that depend on them."""
    w = torch.tensor([1.0, -2.0], dtype=DOUBLE, requires_grad=True)
    optimizer = make([w])
    found = []
    for t in range(steps):
        w.grad = (w.detach() + t).sin()
        optimizer.step()
        found.append(w.detach().clone())
    return torch.stack(found)


@pytest.mark.parametrize(
    ("controller", "same"),
    [
        (partial(NuPI, lr=0.1, proportional=0.0, nu=0.7), partial(torch.optim.SGD, lr=0.1)),
        (partial(NuPI, lr=0.1), partial(OptimisticSGD, lr=0.1)),
        # −ν/(1−ν) at lr/(1−ν) with ν = 0.6
        (partial(NuPI, lr=0.25, proportional=-1.5, nu=0.6), partial(torch.optim.SGD, lr=0.1, momentum=0.6)),
    ],
    ids=["gradient steps", "optimistic", "momentum"],
)
def test_it_holds_other_methods(
    controller: Callable[[list[Tensor]], Optimizer], same: Callable[[list[Tensor]], Optimizer]
) -> None:
    torch.testing.assert_close(path(controller), path(same), rtol=1e-13, atol=1e-13)


def test_it_is_a_controller_with_an_integral_and_a_proportional_part() -> None:
    w = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    optimizer = NuPI([w], lr=0.2, proportional=3.0, nu=0.8, maximize=True)
    violations = torch.randn(6, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    for violation in violations:
        w.grad = violation.clone()
        optimizer.step()
    smoothed = sum(0.2 * 0.8 ** (5 - i) * v for i, v in enumerate(violations))
    torch.testing.assert_close(w.detach(), 0.2 * violations.sum(0) + 0.6 * smoothed, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("damping", [0.0, 0.6, 1.4])
def test_the_proportional_part_damps_the_oscillation(damping: float) -> None:
    """min 0 subject to w = 0 under ẇ = −λ, λ̇ = w + γẇ: w = e^(−γt/2) cos(ωt + …) with ω² = 1 − γ²/4."""
    omega = math.sqrt(1 - damping**2 / 4)
    errors = []
    for dt in (0.02, 0.01):
        w, multiplier = torch.ones(1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE, requires_grad=True)
        optimizer = NuPI([multiplier], lr=dt, proportional=damping / dt, maximize=True)
        # The gain is for the change since zero: begin with the violation that is there, as what is minimized has it.
        optimizer.state[multiplier]["smoothed_grad"] = -w
        largest = 0.0
        for step in range(round(8 / dt)):
            t = dt * step
            exact = math.exp(-damping * t / 2) * (
                math.cos(omega * t) + damping / (2 * omega) * math.sin(omega * t)
            )
            largest = max(largest, abs(float(w) - exact))
            multiplier.grad = w.clone()
            optimizer.step()
            w = w - dt * multiplier.detach()
        errors.append(largest)
    assert errors[0] < 0.1
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)  # Euler's steps are of first order


class Cheapest(AugmentedLagrangian):
    """½w² subject to w = 1, whose multiplier is −1."""

    def __init__(self, multipliers: Callable[[list[Tensor]], Optimizer]) -> None:
        weights = partial(torch.optim.SGD, lr=0.1)
        super().__init__(
            num_equalities=1, optimizers={"weights": weights, "multipliers": multipliers}, penalty=0.01
        )
        self.w = nn.Parameter(torch.zeros(1))
        self.found: list[float] = []

    def constrained_loss(self, batch: object) -> ConstrainedLoss:
        self.found.append(self.w.item())
        return ConstrainedLoss(loss=0.5 * self.w.square().sum(), equalities=self.w - 1)


def test_a_constraint_is_met_with_less_overshoot() -> None:
    def overshoot(optimizer: Callable[[list[Tensor]], Optimizer]) -> float:
        module = Cheapest(optimizer)
        trainer(max_steps=150, max_epochs=-1).fit(module, DataLoader(TensorDataset(torch.zeros(1, 1))))
        assert module.w.item() == pytest.approx(1.0, abs=0.02)
        return max(module.found) - 1

    ascent = overshoot(partial(torch.optim.SGD, lr=0.5))
    damped = overshoot(partial(NuPI, lr=0.5, proportional=6.0))
    assert ascent > 0.3
    assert damped < 0.05


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has gradients of w's dtype only"
)
def test_gradients_of_another_dtype() -> None:
    w = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    w.grad_dtype = torch.float32
    optimizer = NuPI([w], lr=0.25, proportional=2.0, nu=0.5)
    for _ in range(2):
        w.grad = torch.full((2,), 0.5)
        optimizer.step()
    # 1 − ¼(½ + 2·¼) − ¼(½ + 2·⅛), and all of it exact in bf16
    assert w.tolist() == [0.5625, 0.5625]
