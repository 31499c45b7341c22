"""Momentum, scale and sign of an optimizer's next step, and its steps in the long run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_nested.optim import ComplexAdam, ComplexSGD, OptimisticAdam
from lightning_nested.optim.step_dynamics import (
    decay_factors,
    decoupled_rates,
    inverse_rates,
    step_dynamics,
)
from tests.cases import DOUBLE


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


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0, amsgrad=True),
    "large ε": lambda p: torch.optim.Adam(p, lr=0.1, eps=1.0),
    "ComplexSGD": lambda p: ComplexSGD(p, lr=0.1, momentum=0.9, phase=0.4),
    "turned back": lambda p: ComplexSGD(p, lr=0.1, momentum=0.9, phase=3.0),
    "ComplexAdam": lambda p: ComplexAdam(p, lr=0.1, betas=(0.8, 0.9)),
    "OptimisticAdam": lambda p: OptimisticAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1, betas=(0.9, 0.8)),
    # Of a momentum that no longer changes.
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1, momentum_decay=0.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.5),
    "RMSprop, momentum": lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.5, momentum=0.9, eps=1.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inverse_rates_are_the_displacement_under_a_constant_gradient(name: str) -> None:
    gradient = torch.tensor([0.3, -1.2, 4.0], dtype=DOUBLE)
    p = nn.Parameter(torch.zeros(3, dtype=DOUBLE))
    optimizer = OPTIMIZERS[name]([p])
    early = p
    for t in range(200):
        before = p.detach().clone()
        p.grad = gradient.clone()
        optimizer.step()
        if t == 9:
            (early,) = inverse_rates(optimizer, [p])
    moved = (before - p.detach()) / gradient
    (late,) = inverse_rates(optimizer, [p])
    # 0.9^200 = 7e-10 of the momentum is not there yet.
    torch.testing.assert_close(moved * late, torch.ones_like(late), rtol=1e-8, atol=0)
    # A constant gradient has its second moment from the first step on, bias-corrected.
    if name != "ComplexAdam":
        torch.testing.assert_close(early, late, rtol=1e-8, atol=0)


@pytest.mark.parametrize("options", [{}, {"lr_decay": 0.1}, {"initial_accumulator_value": 2.0, "eps": 0.5}])
def test_adagrads_rate_is_that_of_its_next_step(options: Any) -> None:
    p = nn.Parameter(torch.zeros(3, dtype=DOUBLE))
    optimizer = torch.optim.Adagrad([p], lr=0.1, **options)
    assert inverse_rates(optimizer, [p])[0].tolist() == pytest.approx([10.0] * 3)
    for t in range(5):
        p.grad = torch.tensor([0.3, -1.2, 4.0], dtype=DOUBLE) + t
        optimizer.step()
    (inverse,) = inverse_rates(optimizer, [p])
    p.detach().zero_()
    p.grad = torch.full_like(p, 1e-6)
    optimizer.step()
    # 1e-12 in a sum of squares of 1 and more.
    torch.testing.assert_close(-p.detach() / 1e-6 * inverse, torch.ones_like(inverse), rtol=1e-10, atol=0)


def test_centered_rmsprop_divides_by_the_deviation() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=DOUBLE))
    optimizer = torch.optim.RMSprop([p], lr=0.1, alpha=0.9, centered=True)
    for t in range(300):
        p.grad = torch.tensor([0.3, -1.2, 4.0], dtype=DOUBLE) + (-1.0) ** t
        optimizer.step()
    before = p.detach().clone()
    (inverse,) = inverse_rates(optimizer, [p])
    p.grad = torch.tensor([0.3, -1.2, 4.0], dtype=DOUBLE) + 1.0
    optimizer.step()
    # From one step to the next the average square changes by a tenth at most.
    torch.testing.assert_close(
        (before - p.detach()) / p.grad * inverse, torch.ones_like(inverse), rtol=0.1, atol=0
    )


def test_rates_before_the_first_step_and_of_groups() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.5, "momentum": 0.5}, {"params": [c], "lr": 0.0}]
    found = inverse_rates(torch.optim.SGD(groups, lr=0.25), [a, b, c])
    assert [x.tolist() for x in found[:2]] == [[4.0, 4.0], [1.0, 1.0]]
    assert found[2].isfinite().all()
    (fresh,) = inverse_rates(torch.optim.Adam([a], lr=0.25), [a])
    torch.testing.assert_close(fresh, torch.full((2,), 4.0))


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_decay_factors_describe_where_adamw_stands_still(eps: float) -> None:
    """L = ½ Σ aᵢ(wᵢ − 1)² + noise that AdamW sees: the mean gradient and the decay's pull cancel there."""
    curvature = torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE)
    p, decay, rate = nn.Parameter(torch.full((3,), 0.6, dtype=DOUBLE)), 0.3, 4e-3
    optimizer = torch.optim.AdamW([p], lr=rate, weight_decay=decay, eps=eps)
    mean, factor, steps = torch.zeros_like(p), torch.zeros_like(p), 1500
    for t in range(2 * steps):
        noise = (-1.0) ** t * torch.tensor([1.0, 0.5, 2.0], dtype=DOUBLE)
        g = curvature * (p.detach() - 1)
        p.grad = g + noise
        optimizer.step()
        if t >= steps:
            mean += g / steps
        if t >= steps and t % 100 < 2:
            factor += decay_factors(optimizer, {"p": p})["p"] / (steps / 50)
    pull = factor * decay * p.detach()
    torch.testing.assert_close(mean, -pull, rtol=1e-2, atol=1e-3)
    assert decoupled_rates(optimizer) == {id(p): rate}


def test_coupled_decays_have_no_factors() -> None:
    p = nn.Parameter(torch.ones(2))
    for optimizer in (torch.optim.SGD([p], lr=0.1), torch.optim.Adam([p], lr=0.1), ComplexSGD([p], lr=0.1)):
        assert decoupled_rates(optimizer) == {}
        assert decay_factors(optimizer, {"p": p}) == {}
