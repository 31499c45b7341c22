"""The check of products finds wrong second derivatives, and lets right ones of every precision pass."""

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
    GaussNewton,
    Hessian,
    Identity,
    Neumann,
    Nystrom,
    check_products,
)
from lightning_nested.hypergradient.inner_curvature import GivenCurvature
from lightning_nested.hypergradient.mixed_check import FormedMixed, wrong_mixed
from lightning_nested.hypergradient.self_check import FormedProducts, ProductCheck, check_formed_products
from lightning_nested.hyperparameters import WeightNetwork
from lightning_nested.linalg.operators import DiagonalOperator


class Reversed(torch.autograd.Function):
    """Gradient reversal: the gradient is that of no function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return -g[0]


class Turned(torch.autograd.Function):
    """A gradient whose derivative is a matrix that is not symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g[0] * (1 + x.roll(1, -1))


class WrongTwice(torch.autograd.Function):
    """x³ whose gradient is right and whose second derivative lacks a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.detach() * x * g[0]


class Problem:
    """A small network, its training loss and an outer gradient."""

    def __init__(
        self,
        change: Callable[[Tensor], Tensor] = lambda x: x,
        *,
        dtype: torch.dtype = torch.float32,
        half: bool = False,
    ) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3)]
        self.net, self.change, self.half = nn.Sequential(*layers).to(dtype), change, half
        self.x, self.y = torch.randn(32, 6, dtype=dtype), torch.randint(3, (32,))
        self.params = tuple(self.net.parameters())
        self.v = torch.autograd.grad(self.net(torch.randn(32, 6, dtype=dtype)).pow(2).mean(), self.params)
        self.calls = 0

    def loss(self) -> Tensor:
        self.calls += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            hidden = self.net[:2](self.x)
            return functional.cross_entropy(self.net[2:](self.change(hidden)), self.y)

    def check(self, curvature: Any = None, **options: Any) -> ProductCheck:
        curvature, loss = curvature or Hessian(), self.loss()
        given = self.loss if isinstance(curvature, FiniteDifference) else loss
        problem = curvature.linearize(given, self.params)
        return check_products(problem, self.params, self.v, loss=loss, **options)


@pytest.mark.parametrize(
    ("dtype", "half"), [(torch.float64, False), (torch.float32, False), (torch.float32, True)], ids=str
)
def test_right_products_pass(dtype: torch.dtype, half: bool) -> None:
    problem = Problem(dtype=dtype, half=half)
    found = problem.check(repeat=problem.loss)
    assert not found.asymmetric
    assert not found.wrong
    assert problem.check().asymmetry < found.noise / 2
    if not half:  # whose differences are rounding to about a tenth
        assert found.difference < 0.01


def test_a_network_with_kinks_passes() -> None:
    for width in range(4, 20):
        problem = Problem(change=lambda x: (3 * x).relu())
        problem.x = problem.x[:width]
        problem.y = problem.y[:width]
        assert not problem.check(repeat=problem.loss).wrong


@pytest.mark.parametrize(
    "change",
    [lambda x: x * x.detach(), WrongTwice.apply, Reversed.apply, Turned.apply],
    ids=["detached factor", "wrong double backward", "gradient reversal", "not symmetric"],
)
def test_wrong_products_are_found(change: Any) -> None:
    problem = Problem(change)
    assert problem.check(repeat=problem.loss).wrong


def test_asymmetry_is_found_without_a_second_evaluation() -> None:
    problem = Problem(Turned.apply, dtype=torch.float64)
    found = problem.check()
    assert found.asymmetric
    assert math.isnan(found.difference)
    assert problem.calls == 1


def test_it_costs_one_product_and_one_gradient_or_two_products() -> None:
    problem = Problem()
    loss = problem.loss()
    for repeat, products, calls in ((problem.loss, 1, 2), (None, 2, 2)):
        linear = Hessian().linearize(loss, problem.params)
        made: list[Any] = []
        product = linear.curvature.matvec
        setattr(linear.curvature, "matvec", lambda v, p=product, made=made: (made.append(1), p(v))[1])  # noqa: B010
        check_products(linear, problem.params, problem.v, loss=loss, repeat=repeat)
        assert len(made) == products
        assert problem.calls == calls


def test_a_step_that_cannot_be_repeated_is_no_wrong_product() -> None:
    problem = Problem()
    first = problem.x

    def elsewhere() -> Tensor:
        problem.x = torch.randn(32, 6)
        return problem.loss()

    found = problem.check(repeat=elsewhere)
    problem.x = first
    assert math.isnan(found.difference)
    assert not found.wrong


def test_other_curvatures_are_compared_among_themselves_alone() -> None:
    problem = Problem(dtype=torch.float64)
    outputs = problem.net(problem.x)
    loss = functional.cross_entropy(outputs, problem.y)
    newton = GaussNewton(outputs=outputs).linearize(loss, problem.params)
    found = check_products(newton, problem.params, problem.v, loss=loss, repeat=problem.loss)
    assert found.asymmetry < 1e-8
    assert math.isnan(found.difference)
    assert problem.check(FiniteDifference()).asymmetry < 1e-3
    matrix = torch.randn(211, 211, dtype=torch.float64)
    assert math.isnan(problem.check(GivenCurvature(operator=matrix)).asymmetry)


def test_nothing_is_left_behind() -> None:
    problem = Problem(lambda x: x * x.detach())
    before, state = [p.clone() for p in problem.params], torch.get_rng_state()
    assert problem.check(repeat=problem.loss).wrong
    assert all(torch.equal(p, q) for p, q in zip(before, problem.params, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in problem.params)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_directions_without_length_are_not_compared(value: float) -> None:
    problem = Problem()
    problem.v = tuple(torch.full_like(a, value) for a in problem.v)
    found = problem.check(repeat=problem.loss)
    assert math.isnan(found.asymmetry)
    assert not found.asymmetric
    assert not found.wrong


class TestFormedProducts:
    """The same from products that a solver has formed."""

    def check(
        self, problem: Problem, solver: Any, *, repeat: bool = True, curvature: Any = None
    ) -> ProductCheck:
        curvature, loss = curvature or Hessian(), problem.loss()
        given = problem.loss if isinstance(curvature, FiniteDifference) else loss
        linear = curvature.linearize(given, problem.params)
        formed = FormedProducts(linear.curvature, problem.v)
        solver.solve(formed + DiagonalOperator(0.1), problem.v)
        again = problem.loss if repeat else None
        return check_formed_products(linear, problem.params, formed, loss=loss, repeat=again)

    SOLVERS = (Neumann(), Neumann(num_terms=3, step_size=0.1), ConjugateGradient(), Nystrom(rank=5))

    @pytest.mark.parametrize("solver", SOLVERS, ids=str)
    @pytest.mark.parametrize(
        ("dtype", "half"), [(torch.float64, False), (torch.float32, False), (torch.float32, True)], ids=str
    )
    def test_right_products_pass(self, solver: Any, dtype: torch.dtype, half: bool) -> None:
        problem = Problem(dtype=dtype, half=half)
        found = self.check(problem, solver)
        assert not found.wrong
        assert not found.asymmetric
        assert self.check(problem, solver, repeat=False).asymmetry < found.noise / 2

    @pytest.mark.parametrize("solver", SOLVERS, ids=str)
    @pytest.mark.parametrize(
        "change", [lambda x: x * x.detach(), WrongTwice.apply, Reversed.apply, Turned.apply], ids=range(4)
    )
    def test_wrong_products_are_found(self, solver: Any, change: Any) -> None:
        assert self.check(Problem(change), solver).wrong

    @pytest.mark.parametrize("solver", SOLVERS, ids=str)
    def test_asymmetry_is_found_without_a_second_evaluation(self, solver: Any) -> None:
        problem = Problem(Turned.apply, dtype=torch.float64)
        assert self.check(problem, solver, repeat=False).asymmetric
        assert problem.calls == 1

    def test_products_that_are_rounding_are_found(self) -> None:
        # Moves that are too short under bfloat16 change nothing but rounding.
        problem = Problem(half=True)
        found = self.check(problem, Neumann(num_terms=1), curvature=FiniteDifference(epsilon=1e-4))
        assert found.asymmetric

    def test_products_are_those_of_the_curvature(self) -> None:
        problem = Problem()
        curvature = Hessian().linearize(problem.loss(), problem.params).curvature
        formed = FormedProducts(curvature, problem.v)
        for solver in self.SOLVERS:
            plain, kept = (solver.solve(a + DiagonalOperator(0.1), problem.v).x for a in (curvature, formed))
            assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
        assert formed.outer is not None
        assert all(torch.equal(a, b) for a, b in zip(formed.outer[0], problem.v, strict=True))

    def test_no_product_is_nothing_to_compare(self) -> None:
        found = self.check(Problem(), Identity())
        assert math.isnan(found.asymmetry)
        assert math.isnan(found.difference)


class Scaled(torch.autograd.Function):
    """λx, whose gradient by x has no derivative by λ, as in a backward that detaches it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        x, factor = ctx.saved_tensors
        return g[0] * factor.detach(), (g[0] * x).sum()


class HalfScaled(Scaled):
    """The same with half of the mixed derivative."""

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        x, factor = ctx.saved_tensors
        return g[0] * (factor + factor.detach()) / 2, (g[0] * x.detach()).sum()


def mixed_problem(scale: Callable[..., Tensor], dtype: torch.dtype, net: nn.Module | None = None) -> Any:
    """Return the parameters, two hyperparameters in the loss of which the second is in ``scale``, and the loss."""
    torch.manual_seed(0)
    net = (net or nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))).to(dtype)
    x, y = torch.randn(16, 4, dtype=dtype), torch.randn(16, 1, dtype=dtype)
    smooth, factor = (torch.full((), a, dtype=dtype, requires_grad=True) for a in (0.3, 1.5))

    def loss() -> Tensor:
        return ((scale(net(x), factor) - y * (1 - smooth)) ** 2).mean() + smooth * 0.1

    return tuple(net.parameters()), (smooth, factor), loss


class Detached(torch.autograd.Function):
    """½eʰ‖w‖², whose derivative by h forgets w."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(h, w)
        return 0.5 * h.exp() * w.square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        h, w = ctx.saved_tensors
        return gradient * (0.5 * h.exp() * w.detach().square().sum()), gradient * h.exp().detach() * w


def found_wrong(
    params: Any, hparams: Any, loss: Callable[[], Tensor]
) -> tuple[dict[int, float], int, FormedMixed]:
    """Return what is wrong, and how often the loss was evaluated for that."""
    graph, calls = loss(), []
    formed = FormedMixed(Hessian().linearize(graph, params).mixed)
    v = tuple(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p) for p in params)
    formed(v, hparams)

    def repeat() -> Tensor:
        calls.append(1)
        return loss()

    return wrong_mixed(params, formed, loss=graph, repeat=repeat), len(calls), formed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [nn.Tanh, nn.ReLU])
def test_right_mixed_derivatives_pass_with_one_evaluation(dtype: torch.dtype, layer: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 6), layer(), nn.Linear(6, 1))
    params, hparams, loss = mixed_problem(torch.mul, dtype, net)
    before = [p.detach().clone() for p in params]
    wrong, evaluations, formed = found_wrong(params, hparams, loss)
    assert wrong == {}
    assert evaluations == 1
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    # The loss's graph is kept.
    assert formed.first is not None
    assert torch.isfinite(torch.autograd.grad(loss(), params)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [Scaled.apply, HalfScaled.apply])
def test_wrong_mixed_derivatives_are_found_and_only_they(scale: Any, dtype: torch.dtype) -> None:
    wrong, evaluations, formed = found_wrong(*mixed_problem(scale, dtype))
    right = found_wrong(*mixed_problem(torch.mul, dtype))[2]
    assert formed.first is not None
    assert right.first is not None
    (is_, should) = (float(found.first[2][1]) for found in (formed, right))  # type: ignore[index, arg-type]
    assert wrong.keys() == {1}
    # Differences are exact up to their length's square, 0.0025² for a vector of length 1 in float32.
    expected = abs(is_ - should) / max(abs(is_), abs(should))
    assert wrong[1] == pytest.approx(expected, rel=0.01)
    assert evaluations == 2


def test_a_mixed_derivative_of_exactly_zero_is_right() -> None:
    params, hparams, loss = mixed_problem(torch.mul, torch.float32)
    extra = torch.full((), 1e3, requires_grad=True)
    wrong, evaluations, _ = found_wrong(params, (*hparams, extra), lambda: loss() + extra**2)
    assert wrong == {}
    assert evaluations == 1


@pytest.mark.parametrize("seed", [4, 7])
def test_a_mixed_derivative_that_cancels_is_not_told_wrong_for_its_rounding(seed: int) -> None:
    """What scales all weights of a WeightNetwork, in units of their mean, changes nothing while they are equal."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    x, y = torch.rand(64, 64), torch.randint(10, (64,))
    weights = WeightNetwork()
    weights.build(dict(net.named_parameters()))

    def loss() -> Tensor:
        return weights(functional.cross_entropy(net(x), y, reduction="none")).mean()

    loss()  # the first batch decides what the mean is of
    wrong, evaluations, formed = found_wrong(tuple(net.parameters()), tuple(weights.tensors.values()), loss)
    assert formed.first is not None
    slope, shift = (float(p.abs().max()) for p in formed.first[2][-2:] if p is not None)
    assert shift < 1e-4 * slope
    assert wrong == {}
    assert evaluations <= 4


@pytest.mark.parametrize("strength", [1e-5, 1e-7])
def test_a_wrong_mixed_derivative_of_a_very_weak_hyperparameter_is_found(strength: float) -> None:
    params, hparams, loss = mixed_problem(torch.mul, torch.float32)
    decay = torch.full((), strength).log().requires_grad_()

    def penalized() -> Tensor:
        return 3.0 + loss() + Detached.apply(decay, params[0])

    wrong, evaluations, _ = found_wrong(params, (*hparams, decay), penalized)
    assert wrong == {2: pytest.approx(1.0, abs=1e-3)}
    assert evaluations <= 4
