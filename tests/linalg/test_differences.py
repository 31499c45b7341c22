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
    Neumann,
    SolverState,
    implicit_hypergradient,
)
from lightning_nested.hypergradient.implicit import implicit_result
from lightning_nested.linalg.curvature import FiniteDifferenceOperator, HessianOperator
from lightning_nested.linalg.differences import (
    OneSided,
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
    # One gradient, one for the product, two for the mixed derivative; where the length is measured, three or more of
    # which the product is made.
    assert [count == 4 for count in counts] == [False, False, True, False, True]
    assert min(counts) == 4
    assert lengths[1] == lengths[2]
    assert state.sides == 1
    loaded = SolverState()
    loaded.load_state_dict(state.state_dict(), case.params)
    assert (loaded.length, loaded.sides, loaded.solves) == (state.length, 1, 5)
    # A checkpoint from before lengths were measured.
    loaded.load_state_dict({"solution": None, "eigenvector": None, "eigenvalue": 2.0}, case.params)
    assert (loaded.length, loaded.sides, loaded.solves, loaded.eigenvalue) == (None, 2, 0, 2.0)


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


def counted(case: Scaled, calls: list[int]) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        calls.append(1)
        return case.loss()

    return loss


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_one_sided_products_are_right_for_one_gradient_each(scale: float) -> None:
    case, calls = Scaled(scale), []
    operator = FiniteDifference().linearize(counted(case, calls), case.params).curvature
    assert isinstance(operator, FiniteDifferenceOperator)
    assert len(calls) == 1
    operator.calibrate(case.direction)
    assert operator.sides == 1
    calls.clear()
    first, second = (flatten(operator @ case.direction).double() for _ in range(2))
    assert len(calls) == 1  # the first is made of what the calibration has seen
    case.net, case.x = case.net.double(), case.x.double()
    exact = flatten(HessianOperator(case.loss(), case.params) @ tuple(v.double() for v in case.direction))
    for found in (first, second):
        # √eps of float32 is 3.5e-4; the estimate bounds the error.
        assert float((found - exact).norm() / exact.norm()) < min(2e-3, 2 * operator.error)


@pytest.mark.parametrize(
    ("half", "sides", "expected"), [(True, None, 2), (True, 1, 1), (False, 2, 2), (False, 1, 1)]
)
def test_half_precision_takes_central_differences_unless_told_otherwise(
    half: bool, sides: int | None, expected: int
) -> None:
    case = Scaled(1.0, half=half)
    operator = FiniteDifference(sides=sides).linearize(case.loss, case.params).curvature
    assert isinstance(operator, FiniteDifferenceOperator)
    operator.calibrate(case.direction)
    assert operator.sides == expected


def test_one_side_is_not_enough_where_rounding_is_large() -> None:
    """A gradient of 1e3 and a change of it of 1e-2: rounding of one-sided differences is per cents of the product."""
    torch.manual_seed(0)
    w = (torch.ones(50) / 50).requires_grad_()
    slope = 1e3 * torch.randn(50)
    operator = FiniteDifference().linearize(lambda: (slope * w + 1e-3 * w.sin()).sum(), (w,)).curvature
    assert isinstance(operator, FiniteDifferenceOperator)
    operator.calibrate((torch.ones(50),))
    assert operator.sides == 2


def test_a_given_epsilon_is_central_unless_told_otherwise() -> None:
    case = Scaled(1.0)
    for sides, calls in ((None, 2), (1, 1)):
        made: list[int] = []
        curvature = FiniteDifference(epsilon=1e-3, sides=sides)
        operator = curvature.linearize(counted(case, made), case.params).curvature
        made.clear()
        operator.matvec(case.direction)
        assert len(made) == calls


def test_five_terms_take_ten_gradients() -> None:
    """One at the weights, three that measure and make the first product, four products, two for the mixed part."""
    case, calls, h = Scaled(1.0), [], torch.ones((), requires_grad=True)
    inner = counted(case, calls)
    implicit_hypergradient(
        lambda: h * inner() + case.params[0].square().sum(),
        case.loss(),
        case.params,
        [h],
        solver=Neumann(num_terms=5, step_size=0.1),
        curvature=FiniteDifference(),
    )
    assert len(calls) == 10


def test_double_precision_keeps_its_digits() -> None:
    case = Scaled(1.0)
    case.net, case.x = case.net.double(), case.x.double()
    operator = FiniteDifference().linearize(case.loss, (case.net[0].weight,)).curvature
    assert isinstance(operator, FiniteDifferenceOperator)
    operator.calibrate((case.direction[0].double(),))
    assert operator.sides == 2


def test_other_sides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sides must be 1, 2 or None. Got 3"):
        FiniteDifference(sides=3)
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="sides=1 needs here"):
        FiniteDifferenceOperator(lambda: (w.detach(),), (w,), sides=1)


def test_casts_of_the_weights_are_not_reused_inside_autocast() -> None:
    case = Scaled(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        case.gradient()  # inside an outer autocast its casts stay
        found = central_difference(case.gradient, case.params, case.direction, 0.1)
    assert float(found[0].norm()) > 0


def test_kinks_show_in_the_estimated_error() -> None:
    """ReLU after batch normalization: gradients jump, and the calibration says how little its products are worth."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    net = nn.Sequential(*layers)
    x, params = torch.randn(64, 64), tuple(net.parameters())
    v = tuple(torch.randn_like(p) for p in params)
    operator = FiniteDifference().linearize(lambda: net(x).square().mean(), params).curvature
    assert isinstance(operator, FiniteDifferenceOperator)
    operator.calibrate(v)
    operator.matvec(v)  # the first one is extrapolated
    exact = flatten(HessianOperator(net(x).square().mean(), params) @ v)
    error = float((flatten(operator @ v) - exact).norm() / exact.norm())
    assert operator.sides == 2
    assert error > 0.01
    assert operator.error > error / 5


def waves(w: Tensor) -> Tensor:
    return (w.sin() * torch.arange(1.0, 4.0, dtype=w.dtype)).sum()


def test_one_sided_products_leave_each_other_and_the_parameters_alone() -> None:
    w = torch.tensor([0.3, 0.5, 0.7], dtype=DOUBLE, requires_grad=True)
    home, v = w.detach().clone(), torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    operator = FiniteDifference(sides=1).linearize(lambda: waves(w), (w,)).curvature
    first = operator @ (v,)
    kept = first[0].clone()
    # The same multiple of the gradient, another one, and none.
    for factor in (1.1, 1e3, 0.0, 1.0):
        found = operator @ (factor * v,)
        torch.testing.assert_close(found[0], factor * kept, rtol=1e-6, atol=0)
    assert torch.equal(first[0], kept)
    assert torch.equal(w, home)
    exact = -home.sin() * torch.arange(1.0, 4.0, dtype=DOUBLE) * v
    torch.testing.assert_close(kept, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-3, 1.0, 7.0])
def test_one_sided_moves_are_nearly_as_long_as_asked_for(size: float) -> None:
    w, moves = torch.zeros(4, dtype=DOUBLE, requires_grad=True), []

    def gradient() -> tuple[Tensor, ...]:
        moves.append(float(w.detach().norm()))
        return (2 * w.detach(),)

    difference = OneSided(gradient, (w,), (torch.zeros(4, dtype=DOUBLE),))
    v = torch.full((4,), size / 2, dtype=DOUBLE)
    (found,) = difference((v,), 0.01)
    assert torch.equal(found, 2 * v)
    assert 0.01 / 1.42 < moves[0] < 0.01 * 1.42
    assert math.log2(size / moves[0]) == pytest.approx(round(math.log2(size / moves[0])), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_differences_of_large_gradients_stay_in_the_range_of_the_dtype(dtype: torch.dtype) -> None:
    w = torch.zeros(2, dtype=dtype, requires_grad=True)
    here = torch.full((2,), 60_000.0, dtype=dtype)
    difference = OneSided(lambda: (here + 64 * (w.detach() != 0),), (w,), (here,))
    (found,) = difference((torch.ones(2, dtype=dtype),), 0.5)
    assert found.isfinite().all()
    assert (found > 0).all()


def test_a_gradient_that_is_a_moved_parameter_is_copied() -> None:
    class Product(torch.autograd.Function):
        """½ aᵀa, whose derivative is the parameter itself."""

        @staticmethod
        def forward(ctx: Any, a: Tensor) -> Tensor:
            ctx.save_for_backward(a)
            return 0.5 * (a * a).sum()

        @staticmethod
        def backward(ctx: Any, *outer: Tensor) -> Tensor:
            (a,) = ctx.saved_tensors
            return a.detach()

    w = torch.tensor([1.0, 2.0], dtype=DOUBLE, requires_grad=True)
    v = (torch.tensor([0.5, -1.0], dtype=DOUBLE),)
    for sides in (1, 2):
        operator = FiniteDifference(sides=sides).linearize(lambda: Product.apply(w), (w,)).curvature
        for _ in range(2):
            torch.testing.assert_close((operator @ v)[0], v[0], rtol=1e-6, atol=0)
    assert torch.equal(w, torch.tensor([1.0, 2.0], dtype=DOUBLE))


@pytest.mark.parametrize("sides", [1, 2])
def test_a_users_gradient_may_hand_back_the_moved_weights(sides: int) -> None:
    """Of ½‖w‖²: the memory of a move is used again, and the products must not be."""
    w = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE, requires_grad=True)
    operator = FiniteDifferenceOperator(
        lambda: (w.detach(),), (w,), here=(w.detach().clone(),), sides=sides, epsilon=1e-3
    )
    first, second = torch.tensor([1.0, 0.0, -1.0], dtype=DOUBLE), torch.tensor([0.0, 5.0, 2.0], dtype=DOUBLE)
    products = operator.matvec((first,)), operator.matvec((second,))
    for (found,), v in zip(products, (first, second), strict=True):
        torch.testing.assert_close(found, v, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sides", [1, 2])
def test_gradients_with_a_graph_give_products_without_one(sides: int) -> None:
    w = torch.tensor([0.3, 0.5, 0.7], dtype=DOUBLE, requires_grad=True)

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(waves(w), (w,), create_graph=True)

    here = tuple(g.detach() for g in gradient())
    (found,) = FiniteDifferenceOperator(gradient, (w,), here=here, sides=sides).matvec((torch.ones_like(w),))
    exact = -w.detach().sin() * torch.arange(1.0, 4.0, dtype=DOUBLE)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
    assert not found.requires_grad


def test_a_users_length_is_kept_to() -> None:
    w, seen = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE, requires_grad=True), []

    def gradient() -> tuple[Tensor, ...]:
        seen.append(w.detach().clone())
        return (2 * w.detach(),)

    operator = FiniteDifferenceOperator(gradient, (w,), epsilon=0.0035, here=gradient(), sides=1)
    operator.matvec((torch.ones_like(w),))
    assert float((seen[-1] - seen[0]).norm()) == pytest.approx(0.0035 * (1 + 14**0.5), rel=1e-9)
