"""The length of central differences follows the function's own scale, and the precision it is computed in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.hypergradient import (
    ConjugateGradient,
    FiniteDifference,
    SolverState,
    implicit_hypergradient,
)
from lightning_nested.hypergradient.implicit import implicit_result
from lightning_nested.linalg.curvature import FiniteDifferenceOperator, HessianOperator
from lightning_nested.linalg.differences import (
    calibrated_length,
    central_difference,
    difference_length,
    moved,
)
from lightning_nested.linalg.vectors import flatten
from tests.cases import DOUBLE


class Scaled:
    """A network whose first weights are ``scale`` times as long and whose inputs are as much shorter: one function."""

    def __init__(self, scale: float, *, half: bool = False) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 4))
        self.x, self.y, self.half = torch.randn(32, 16) / scale, torch.randint(4, (32,)), half
        with torch.no_grad():
            self.net[0].weight.mul_(scale)
        self.params = (self.net[0].weight,)
        self.direction = (torch.randn(32, 16),)

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            return functional.cross_entropy(self.net(self.x), self.y)

    def gradient(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(), self.params)

    def errors(self) -> Callable[[float], float]:
        """Return the relative error of a product as a function of the move's length."""
        self.half, half = False, self.half
        self.net, self.x = self.net.double(), self.x.double()
        params = tuple(p.double() for p in self.params)
        exact = flatten(HessianOperator(self.loss(), self.params) @ tuple(v.double() for v in self.direction))
        self.net, self.x, self.half = self.net.float(), self.x.float(), half
        assert all(torch.equal(p, q.double()) for p, q in zip(params, self.params, strict=True))

        def error(length: float) -> float:
            found = flatten(central_difference(self.gradient, self.params, self.direction, length)).double()
            return float((found - exact).norm() / exact.norm())

        return error


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_the_calibrated_length_is_nearly_the_best(scale: float, half: bool) -> None:
    case = Scaled(scale, half=half)
    error = case.errors()
    best = min(error(10**k) for k in torch.linspace(-6, 4, 41).tolist())
    start = difference_length(case.params, case.loss())
    length = calibrated_length(case.gradient, case.params, case.direction, start)
    # At twice the best length truncation is four times larger, and below 0.001 no better one is looked for.
    assert error(length) < max(5 * best, 2e-3), (error(length), best, length)
    if scale != 1.0 and not half:
        assert error(start) > 4 * error(length)


def test_a_length_that_serves_costs_six_gradients() -> None:
    case, calls = Scaled(1.0), []

    def gradient() -> tuple[Tensor, ...]:
        calls.append(1)
        return case.gradient()

    length = calibrated_length(gradient, case.params, case.direction, 1e-2)
    assert len(calls) == 6
    calls.clear()
    calibrated_length(gradient, case.params, case.direction, length)
    assert len(calls) == 6
    calls.clear()
    far = calibrated_length(gradient, case.params, case.direction, 1e4)
    assert 6 < len(calls) < 40
    assert 1e-2 < far / length < 1e2


@pytest.mark.parametrize("direction", [0.0, math.nan])
def test_a_direction_without_length_leaves_the_start(direction: float) -> None:
    w = torch.ones(2, requires_grad=True)
    assert calibrated_length(lambda: (2 * w.detach(),), (w,), (torch.full((2,), direction),), 0.1) == 0.1


def test_a_move_that_overflows_is_shortened() -> None:
    w = torch.ones(1, dtype=DOUBLE, requires_grad=True)

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad((100 * w).exp().sum(), w)

    length = calibrated_length(gradient, (w,), (torch.ones(1, dtype=DOUBLE),), 10.0)
    assert 1e-7 < length < 1e-3
    assert w.item() == 1.0


def test_a_function_without_a_derivative_leaves_the_start() -> None:
    w = torch.ones(2, requires_grad=True)
    assert calibrated_length(lambda: (torch.ones(2),), (w,), (torch.ones(2),), 0.1) == 0.1
    generator = torch.Generator().manual_seed(0)
    noise = calibrated_length(lambda: (torch.randn(99, generator=generator),), (w,), (torch.ones(2),), 0.1)
    assert noise == 0.1


def test_an_exception_leaves_the_parameters_where_they_were() -> None:
    w = torch.ones(3, requires_grad=True)

    def fail() -> Any:
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        moved(fail, (w,), (torch.ones(3),), 0.5)
    assert torch.equal(w, torch.ones(3))


def test_the_length_is_measured_seldom_and_kept_between_solves() -> None:
    case, calls = Scaled(1e3), []
    h = torch.ones((), requires_grad=True)

    def inner() -> Tensor:
        calls.append(1)
        return h * case.loss() + case.net[0].weight.pow(2).sum() * 1e-3

    state, counts, lengths = SolverState(), [], []
    for _ in range(5):
        calls.clear()
        result = implicit_result(
            inner,
            case.loss(),
            case.params,
            [h],
            solver=ConjugateGradient(max_iterations=1, tolerance=0.0),
            curvature=FiniteDifference(),
            state=state,
        )
        state = result.solution.state
        counts.append(len(calls))
        lengths.append(state.length)
    assert state.solves == 5
    # One gradient, two for the product, three for the mixed derivative; and six or more to measure.
    assert [count == 6 for count in counts] == [False, False, True, False, True]
    assert lengths[1] == lengths[2]
    loaded = SolverState()
    loaded.load_state_dict(state.state_dict(), case.params)
    assert (loaded.length, loaded.solves) == (state.length, 5)
    # A checkpoint from before lengths were measured.
    loaded.load_state_dict({"solution": None, "eigenvector": None, "eigenvalue": 2.0}, case.params)
    assert (loaded.length, loaded.solves, loaded.eigenvalue) == (None, 0, 2.0)


def test_a_given_epsilon_stays_relative_to_the_weights() -> None:
    w = torch.full((4,), 3.0, requires_grad=True)  # ‖w‖ = 6
    operator = FiniteDifferenceOperator(lambda: (2 * w.detach(),), (w,), epsilon=0.01)
    assert operator.length == pytest.approx(0.07)
    assert not operator.calibrates
    assert FiniteDifferenceOperator(lambda: (w.detach(),), (w,)).length == difference_length((w,))


def test_hypergradients_by_differences_are_right_at_any_scale() -> None:
    for scale in (1e-2, 1.0, 1e3):
        case, h = Scaled(scale), torch.ones((), requires_grad=True)

        def inner(case: Scaled = case, h: Tensor = h, scale: float = scale) -> Tensor:
            return h * case.loss() + (case.params[0] / scale).pow(2).sum() * 0.1

        solver = ConjugateGradient(max_iterations=50, tolerance=1e-4)
        arguments: Any = (case.net(case.x).pow(2).mean(), case.params, [h])
        (exact,) = implicit_hypergradient(inner(), *arguments, solver=solver)
        arguments = (case.net(case.x).pow(2).mean(), case.params, [h])
        (found,) = implicit_hypergradient(inner, *arguments, solver=solver, curvature=FiniteDifference())
        torch.testing.assert_close(found, exact, rtol=2e-2, atol=0.0)
