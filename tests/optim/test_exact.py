"""The optimizers against torch's own, and against other forms of the same method."""

from __future__ import annotations

import cmath
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from lightning_nested.optim import (
    ComplexAdam,
    ComplexSGD,
    ExtrapolationFromThePast,
    GameOptimizer,
    OptimisticAdam,
    OptimisticSGD,
)
from tests.capabilities import TORCH_2_5
from tests.optim.cases import Quadratic, follow

DOUBLE = torch.float64


def iterates(make: Callable[[list[Tensor]], Any], steps: int = 30, scheduler: Any = None) -> Tensor:
    """All parameters after each step on a quadratic whose gradients also change with time."""
    problem, rows = Quadratic(), []
    optimizer = make(problem.params)
    schedule = scheduler(optimizer) if scheduler else None
    for t in range(steps):
        problem.gradients()
        for p in problem.params:
            p.grad.add_(math.sin(0.7 * t))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        rows.append(torch.cat([p.detach().reshape(-1) for p in problem.params]))
    return torch.stack(rows)


def assert_same(left: Tensor, right: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


# --- torch's own

SCHEDULERS = {
    "constant": None,
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "one cycle, momentum too": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
}


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}])
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_phase_0_is_sgd(options: dict[str, Any], schedule: str, momentum: float) -> None:
    ours = iterates(lambda p: ComplexSGD(p, 0.05, momentum, 0.0, **options), scheduler=SCHEDULERS[schedule])
    theirs = iterates(
        lambda p: torch.optim.SGD(p, 0.05, momentum=max(momentum, 1e-300), **options),
        scheduler=SCHEDULERS[schedule],
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}])
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.99)])
def test_phase_0_with_debias_is_adam(
    options: dict[str, Any], schedule: str, betas: tuple[float, float]
) -> None:
    def cycle(o: Any) -> Any:
        scheduler = SCHEDULERS[schedule]
        return scheduler(o) if scheduler else lr_scheduler.ConstantLR(o)

    def ours(p: list[Tensor]) -> GameOptimizer:
        return ComplexAdam(p, 0.01, betas, 0.0, debias=True, **options)

    if "momentum" in schedule:
        # Adam corrects its first moment for the present β₁ alone, and its average was formed with other factors
        # 1 − β₁: under a changing β₁ the two are different methods, and only a constant one is compared.
        cycle = lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40, cycle_momentum=False)  # noqa: E731
    theirs = iterates(lambda p: torch.optim.Adam(p, 0.01, betas, **options), scheduler=cycle)
    assert_same(iterates(ours, scheduler=cycle), theirs)


def assert_continues(
    theirs: Any, problem: Quadratic, ours: GameOptimizer, other: Quadratic, **tolerance: float
) -> None:
    """Five more steps of both, from the same parameters, are the same."""
    with torch.no_grad():
        for p, value in zip(other.params, problem.values(), strict=True):
            p.copy_(value)
    for _ in range(5):
        problem.gradients()
        theirs.step()
    follow(ours, other.gradients, 5)
    for a, b in zip(problem.values(), other.values(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_a_state_of_torch_sgd_loads() -> None:
    problem, other = Quadratic(), Quadratic()
    theirs = torch.optim.SGD(problem.params, 0.05, momentum=0.9)
    for _ in range(5):
        problem.gradients()
        theirs.step()
    ours = ComplexSGD(other.params, 1.0, phase=0.0)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # loading itself copies nothing
    assert_continues(theirs, problem, ours, other, rtol=0, atol=0)


def test_without_betas_optimistic_adam_is_optimistic_sign_descent() -> None:
    p = torch.tensor([1.0, -1.0], dtype=DOUBLE, requires_grad=True)
    optimizer = OptimisticAdam([p], 0.1, betas=(0, 0), eps=0.0)
    for gradient in ([3.0, -2.0], [-1.0, -5.0]):
        p.grad = torch.tensor(gradient, dtype=DOUBLE)
        optimizer.step()
    # −lr·2·(1, −1), then −lr·(2·(−1, −1) − (1, −1))
    assert_same(p.detach(), torch.tensor([1 - 0.2 + 0.3, -1 + 0.2 + 0.1], dtype=DOUBLE))


# --- other forms of the same


@pytest.mark.parametrize("phase", [math.pi / 8, 1.5, math.pi])
def test_the_conjugate_momentum_gives_the_same(phase: float) -> None:
    sgd = [iterates(lambda p, q=q: ComplexSGD(p, 0.05, 0.8, q)) for q in (phase, -phase)]
    assert_same(*sgd, tolerance=0)
    for options in ({"debias": False}, {"debias": True}):
        adam = [
            iterates(lambda p, q=q, options=options: ComplexAdam(p, 0.01, phase=q, **options))
            for q in (phase, -phase)
        ]
        assert_same(*adam)


class AveragedMomenta(torch.optim.Optimizer):
    """Aggregated momentum: vᵢ ← βᵢvᵢ − g, w ← w + lr·mean vᵢ. Lucas, Sun, Zemel & Grosse (2019), ICLR."""

    def __init__(self, params: Any, lr: float, betas: tuple[complex, ...]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["v"] = [
                    b * v - p.grad
                    for b, v in zip(group["betas"], state.get("v", [0.0] * len(group["betas"])), strict=True)
                ]
                update = torch.stack([torch.as_tensor(v) for v in state["v"]]).mean(0)
                assert update.is_complex() is False or float(update.imag.abs().max()) < 1e-12
                p.add_(update.real if update.is_complex() else update, alpha=group["lr"])


@pytest.mark.parametrize("phase", [math.pi / 8, 2.0])
def test_two_averaged_conjugate_momenta_give_the_same(phase: float) -> None:
    beta = cmath.rect(0.8, phase)
    averaged = iterates(lambda p: AveragedMomenta(p, 0.05, (beta, beta.conjugate())))
    assert_same(iterates(lambda p: ComplexSGD(p, 0.05, 0.8, phase)), averaged)


def test_written_out_as_a_sum_over_old_gradients() -> None:
    gradients = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    p = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    optimizer = ComplexSGD([p], lr=0.3, momentum=0.7, phase=0.9)
    expected = 0.0
    for t in range(12):
        p.grad = gradients[t].clone()
        optimizer.step()
        expected -= 0.3 * sum(0.7**k * math.cos(0.9 * k) * gradients[t - k].item() for k in range(t + 1))
        assert p.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("phase", [0.0, 0.4, math.pi / 2, math.pi])
def test_debias_returns_a_constant_gradient_unchanged(momentum: float, phase: float) -> None:
    p = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    optimizer = ComplexAdam([p], 1.0, (momentum, 0.0), phase, eps=0.0, debias=True)
    for t in range(1, 40):
        p.grad = torch.tensor(2.0, dtype=DOUBLE)
        optimizer.step()  # β₂ = 0: g/√g² = 1
        assert p.item() == pytest.approx(-t, rel=1e-9)


def test_extrapolation_from_the_past_is_optimistic() -> None:
    assert_same(
        iterates(lambda p: ExtrapolationFromThePast(p, 0.1)), iterates(lambda p: OptimisticSGD(p, 0.1))
    )


def test_the_phase_can_change_on_the_way() -> None:
    """Real momentum keeps no imaginary buffer; a later phase starts it at zero, and when it goes the buffer fades."""
    gradients = torch.randn(9, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    p = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    optimizer = ComplexSGD([p], lr=0.3, momentum=0.7)
    mu, w = 0j, 0.0
    for t, phase in enumerate([0.0, 0.0, 0.0, 0.8, 0.8, math.pi, math.pi, 0.0, 0.5]):
        optimizer.param_groups[0]["phase"] = phase
        p.grad = gradients[t].clone()
        optimizer.step()
        mu = cmath.rect(0.7, phase) * mu - gradients[t].item()
        w += 0.3 * mu.real
        assert p.item() == pytest.approx(w, rel=1e-12, abs=1e-13)
        assert ("momentum_buffer_imag" in optimizer.state[p]) == (t >= 3)


def test_a_state_of_torch_adam_loads() -> None:
    problem, other = Quadratic(), Quadratic()
    theirs = torch.optim.Adam(problem.params, 0.05, betas=(0.7, 0.9))
    for _ in range(5):
        problem.gradients()
        theirs.step()
    saved = theirs.state_dict()
    names = set(saved["state"][0])
    ours = ComplexAdam(other.params, 1.0, phase=0.0, debias=True)
    ours.load_state_dict(copy.deepcopy(saved))
    assert set(saved["state"][0]) == names
    assert_continues(theirs, problem, ours, other, rtol=1e-12, atol=1e-14)
    again = ComplexAdam(other.params, 1.0, phase=0.0, debias=True)
    again.load_state_dict(ours.state_dict())
    assert again.state[other.params[0]].keys() == ours.state[other.params[0]].keys()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), lambda p: ComplexSGD(p, 0.1)),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.1), lambda p: ComplexSGD(p, 0.1)),
        (lambda p: torch.optim.Adam(p, 0.1, amsgrad=True), ComplexAdam),
        pytest.param(
            lambda p: torch.optim.AdamW(p, 0.1),
            ComplexAdam,
            marks=pytest.mark.skipif(
                TORCH_2_5, reason="states of AdamW of torch 2.5 do not say what they are"
            ),
        ),
    ],
)
def test_states_of_other_methods_are_refused(theirs: Any, ours: Any) -> None:
    problem = Quadratic()
    optimizer = theirs(problem.params)
    problem.gradients()
    optimizer.step()
    with pytest.raises(ValueError, match="A loaded state must be of Complex"):
        ours(problem.params).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("phase", [3.1416, -3.142])
def test_pi_rounded_up_is_pi(phase: float) -> None:
    """So momentum is real, and there is no second buffer."""
    problem = Quadratic()
    optimizer = ComplexSGD(problem.params, 0.05, momentum=0.5, phase=phase)
    problem.gradients()
    optimizer.step()
    assert optimizer.param_groups[0]["phase"] == math.copysign(math.pi, phase)
    assert all("momentum_buffer_imag" not in optimizer.state[p] for p in problem.params)
