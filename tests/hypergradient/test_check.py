"""The check passes what is right, refuses what is wrong, and names every assumption that fails."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_nested.hypergradient.check import HypergradientReport, check_hypergradient
from lightning_nested.hypergradient.inner_curvature import FiniteDifference
from lightning_nested.hypergradient.retraining import Minimize, Unroll
from lightning_nested.hypergradient.unrolled import unrolled_hypergradient
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.solvers.conjugate_gradient import ConjugateGradient
from lightning_nested.linalg.solvers.dense import DenseSolve
from lightning_nested.linalg.solvers.neumann import Neumann

Tensors = tuple[Tensor, ...]
EXACT = ConjugateGradient(max_iterations=200, tolerance=1e-13)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Ridge:
    """½ mean(Xw − y)² + ½ Σ eʳ w², one log decay per weight; outer the error on other data."""

    def __init__(self, normal: Any, dtype: torch.dtype = torch.float64) -> None:
        self.x, self.y, self.xv, self.yv = (
            t.to(dtype) for t in (normal(12, 5), normal(12), normal(9, 5), normal(9))
        )
        self.hparams = (torch.full((5,), -1.0, dtype=dtype),)
        self.params = self.solve(self.hparams)

    def solve(self, hparams: Tensors) -> Tensors:
        x, y = self.x.to(hparams[0]), self.y.to(hparams[0])
        return (torch.linalg.solve(x.T @ x / 12 + hparams[0].exp().diag(), x.T @ y / 12),)

    def inner(self, w: Tensors, h: Tensors) -> Tensor:
        return 0.5 * ((self.x @ w[0] - self.y) ** 2).mean() + 0.5 * (h[0].exp() * w[0] ** 2).sum()

    def outer(self, w: Tensors, h: Tensors) -> Tensor:
        return 0.5 * ((self.xv @ w[0] - self.yv) ** 2).mean()

    def check(self, **options: Any) -> HypergradientReport:
        arguments: dict[str, Any] = {"params": self.params, "hparams": self.hparams, "solver": EXACT}
        return check_hypergradient(self.inner, self.outer, **arguments | options)

    def exact(self) -> Tensor:
        h = self.hparams[0].clone().requires_grad_()
        return torch.autograd.grad(self.outer(self.solve((h,)), (h,)), h)[0]


def names(report: HypergradientReport) -> list[str]:
    return [failure.split(":")[0] for failure in report.failures]


# --- what is right passes -----------------------------------------------------------------------


@pytest.mark.parametrize("solver", [EXACT, DenseSolve(), Neumann(num_terms=2000)])
def test_right_hypergradient_passes(normal: Any, solver: Any) -> None:
    report = Ridge(normal).check(solver=solver)
    assert report.passed, report
    assert report.relative_error < 1e-6
    assert report.cosine == pytest.approx(1, abs=1e-9)
    assert report.inner_gradient_norm < 1e-12
    assert report.asymmetry < 1e-10
    assert len(report.predicted) == len(report.measured) == 3
    assert "passed" in str(report)


def test_measured_slopes_are_the_exact_ones(normal: Any) -> None:
    ridge = Ridge(normal)
    report = ridge.check(num_directions=5)  # five elements: the axes
    torch.testing.assert_close(double(*report.measured), ridge.exact(), rtol=1e-7, atol=1e-10)
    matrix = ridge.x.T @ ridge.x / 12 + ridge.hparams[0].exp().diag()
    assert report.curvature == pytest.approx(torch.linalg.eigvalsh(matrix)[0].item(), rel=1e-6)


@pytest.mark.parametrize("retrain", ["solve", "minimize", "unroll"])
def test_every_way_to_retrain_agrees(normal: Any, retrain: str) -> None:
    ridge = Ridge(normal)

    def step(w: Tensors, h: Tensors, t: int) -> Tensors:
        (g,) = torch.autograd.grad(ridge.inner(w, h), w, create_graph=True)
        return (w[0] - 0.3 * g,)

    way = {"solve": ridge.solve, "minimize": Minimize(), "unroll": Unroll(step=step, num_steps=400)}[retrain]
    report = ridge.check(retrain=way)
    assert report.passed, report
    assert report.relative_error < 1e-6


def test_unrolled_hypergradient_is_checked_by_unrolling(normal: Any) -> None:
    ridge = Ridge(normal)

    def step(w: Tensors, h: Tensors, t: int) -> Tensors:
        (g,) = torch.autograd.grad(ridge.inner(w, h), w, create_graph=True)
        return (w[0] - h[1] * g,)

    start, hparams = (torch.zeros(5, dtype=torch.float64),), (*ridge.hparams, double(0.2)[0])
    g = unrolled_hypergradient(step, ridge.outer, start, hparams, num_steps=7)
    options: dict[str, Any] = {"params": start, "hparams": hparams, "retrain": Unroll(step=step, num_steps=7)}
    report = ridge.check(hypergradient=g, **options)
    assert report.passed, report  # a learning rate and no stationary point: no assumption of this gradient
    assert report.relative_error < 1e-6
    assert not ridge.check(hypergradient=[0.9 * x for x in g], **options).passed


def test_float32_parameters_are_checked_in_float64(normal: Any) -> None:
    ridge = Ridge(normal)
    params, hparams = [p.float() for p in ridge.params], [h.float() for h in ridge.hparams]
    report = ridge.check(params=params, hparams=hparams)
    assert report.dtype == torch.float64
    assert report.passed, report
    assert params[0].dtype == torch.float32


def test_float32_data_are_checked_in_float32(normal: Any) -> None:
    report = Ridge(normal, torch.float32).check(solver=DenseSolve())
    assert report.dtype == torch.float32
    assert report.passed, report


def test_dropout_keeps_one_mask_and_the_random_stream_is_left_alone(normal: Any) -> None:
    ridge = Ridge(normal)

    def inner(w: Tensors, h: Tensors) -> Tensor:
        prediction = functional.dropout(ridge.x, 0.5) @ w[0]
        return 0.5 * ((prediction - ridge.y) ** 2).mean() + 0.5 * (h[0].exp() * w[0] ** 2).sum()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = functional.dropout(ridge.x, 0.5)
    w = torch.linalg.solve(x.T @ x / 12 + ridge.hparams[0].exp().diag(), x.T @ ridge.y / 12)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    report = check_hypergradient(inner, ridge.outer, [w], ridge.hparams, solver=EXACT)
    assert report.passed, report
    assert report.relative_error < 1e-6
    assert torch.equal(torch.get_rng_state(), before)


def test_network_at_its_minimum_passes(normal: Any) -> None:
    x, y, xv, yv = normal(10, 3), normal(10), normal(10, 3), normal(10)
    offset = normal(4)  # without it weights can shrink for ever: a layer norm does not see their size

    def net(w: Tensors, x: Tensor) -> Tensor:
        return functional.layer_norm(x @ w[0] + offset, (4,), w[1]).tanh() @ w[2]

    def inner(w: Tensors, h: Tensors) -> Tensor:
        decay = sum(r.exp() * (p**2).sum() for r, p in zip(h[0], w, strict=True))
        return functional.mse_loss(net(w, x), y) + decay

    def outer(w: Tensors, h: Tensors) -> Tensor:
        return functional.mse_loss(net(w, xv), yv)

    h = (double(-2, -2, -3),)
    start = (normal(3, 4), torch.ones(4, dtype=torch.float64), normal(4))
    params = Minimize().train(inner, start, h).params
    report = check_hypergradient(inner, outer, params, h, solver=DenseSolve())
    assert report.passed, report
    assert report.relative_error < 1e-5


def test_zero_hypergradient_passes(normal: Any) -> None:
    ridge = Ridge(normal)

    def outer(w: Tensors, h: Tensors) -> Tensor:
        return ((w[0] - w[0].detach()) ** 2).sum() + 1.0  # stationary everywhere

    report = check_hypergradient(ridge.inner, outer, ridge.params, ridge.hparams, solver=EXACT)
    assert report.passed, report


# --- what is wrong fails, by its name -----------------------------------------------------------


def test_wrong_hypergradient_fails(normal: Any) -> None:
    ridge = Ridge(normal)
    assert ridge.check(hypergradient=[ridge.exact()]).passed
    for wrong in (1.05 * ridge.exact(), -ridge.exact(), ridge.exact().roll(1)):
        report = ridge.check(hypergradient=[wrong])
        assert names(report) == ["wrong hypergradient"]
        assert "FAILED" in str(report)
    assert ridge.check(hypergradient=[1.05 * ridge.exact()]).relative_error == pytest.approx(0.05, rel=1e-3)
    assert ridge.check(hypergradient=[-ridge.exact()]).cosine == pytest.approx(-1)


def test_truncated_solver_is_named(normal: Any) -> None:
    report = Ridge(normal).check(solver=Neumann(num_terms=1))
    assert names(report) == ["wrong hypergradient"]
    assert "residual" in report.failures[0]
    assert "ConjugateGradient" in report.failures[0]


def test_diverging_solver_is_named(normal: Any) -> None:
    report = Ridge(normal).check(solver=Neumann(num_terms=50, step_size=100.0))
    assert names(report) == ["solver failed"]
    assert math.isnan(report.relative_error)
    assert "FAILED" in str(report)


def test_point_that_is_not_stationary_is_named(normal: Any) -> None:
    ridge = Ridge(normal)
    report = ridge.check(params=[ridge.params[0] + 0.5])
    assert names(report) == ["not stationary", "wrong hypergradient"]
    assert report.inner_gradient_norm > 0.05


def test_relative_gradient_does_not_depend_on_the_loss_scale(normal: Any) -> None:
    ridge = Ridge(normal)
    params = [ridge.params[0] + 1e-3]
    small = check_hypergradient(ridge.inner, ridge.outer, params, ridge.hparams, solver=EXACT)
    large = check_hypergradient(
        lambda w, h: 1e4 * ridge.inner(w, h), ridge.outer, params, ridge.hparams, solver=EXACT
    )
    assert small.inner_gradient_norm == pytest.approx(large.inner_gradient_norm, rel=1e-6)


def test_indefinite_hessian_is_named() -> None:
    def inner(w: Tensors, h: Tensors) -> Tensor:
        return ((w[0] - h[0]) ** 2).sum() - 0.5 * (w[1] ** 2 - 0.1 * w[1] ** 4).sum()

    params, hparams = (double(*range(8)), double(0.0)), (double(*range(8)),)
    report = check_hypergradient(
        inner, lambda w, h: (w[0] ** 2).sum() + w[1].sum(), params, hparams, solver=DenseSolve()
    )
    assert "indefinite Hessian" in names(report)
    assert report.curvature == pytest.approx(-1.0)  # one negative direction among nine is found


@pytest.mark.parametrize("outer_sees", [True, False])
def test_unseen_hyperparameter_is_named_with_its_index(normal: Any, outer_sees: bool) -> None:
    ridge = Ridge(normal)

    def outer(w: Tensors, h: Tensors) -> Tensor:
        return ridge.outer(w, h) + (h[1].sum() if outer_sees else 0.0)

    report = check_hypergradient(
        ridge.inner, outer, ridge.params, (*ridge.hparams, double(0.1)), solver=EXACT
    )
    assert names(report) == ["unseen hyperparameter"]
    assert "hparams[1]" in report.failures[0]
    assert "unrolled_hypergradient" in report.failures[0]
    assert ("outer_loss only" in report.failures[0]) == outer_sees
    assert report.relative_error < 1e-6  # the other one is right


def attention_problem(normal: Any, *, math_kernel: bool) -> dict[str, Any]:
    q, y = normal(1, 1, 4, 8), normal(1, 1, 4, 8)

    def inner(w: Tensors, h: Tensors) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH if math_kernel else SDPBackend.FLASH_ATTENTION):
            out = functional.scaled_dot_product_attention(q * w[0], q, q * w[0])
        return ((out - y) ** 2).mean() + h[0].exp() * (w[0] ** 2).sum()

    h = (double(-1.0)[0],)
    params = Minimize().train(inner, (torch.ones(8, dtype=torch.float64),), h).params
    return {
        "inner_loss": inner,
        "outer_loss": lambda w, h: ((w[0] - 1) ** 2).sum(),
        "params": params,
        "hparams": h,
        "solver": EXACT,
    }


def test_attention_without_double_backward_is_named(normal: Any) -> None:
    report = check_hypergradient(**attention_problem(normal, math_kernel=False))
    assert names(report) == ["no double backward"]
    assert "flash_attention" in report.failures[0]
    assert "SDPBackend.MATH" in report.failures[0]
    assert "FiniteDifference" in report.failures[0]
    assert report.relative_error < 1e-5  # by finite differences


def test_both_ways_out_of_no_double_backward_pass(normal: Any) -> None:
    math_kernel = check_hypergradient(**attention_problem(normal, math_kernel=True))
    differences = check_hypergradient(
        **attention_problem(normal, math_kernel=False), curvature=FiniteDifference()
    )
    assert math_kernel.passed, math_kernel
    assert differences.passed, differences


class OnceDifferentiableSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


def test_custom_function_without_double_backward_is_named() -> None:
    def inner(w: Tensors, h: Tensors) -> Tensor:
        return OnceDifferentiableSquare.apply(w[0] - h[0]).sum() + (w[0] ** 2).sum()

    report = check_hypergradient(
        inner, lambda w, h: (w[0] ** 3).sum(), [double(0.5, 1)], [double(1, 2)], solver=EXACT
    )
    assert names(report) == ["no double backward"]
    assert "OnceDifferentiableSquare" in report.failures[0]
    assert report.relative_error < 1e-6  # by finite differences


class JvpOfLayerNorm(LinearOperator):
    """grad(jvp(f)), silently wrong through LayerNorm in torch 2.14."""

    def __init__(self, loss: Any, w: Tensor) -> None:
        self.loss, self.w = loss, w

    def matvec(self, v: Tensors) -> Tensors:
        w = self.w.detach().clone().requires_grad_()
        _, slope = torch.func.jvp(self.loss, (w,), v)
        return torch.autograd.grad(slope, w)


def test_asymmetric_products_are_named(normal: Any) -> None:
    x, y, offset = normal(20, 4), normal(20, 4), normal(4)

    def loss(w: Tensor) -> Tensor:
        return ((functional.layer_norm(x @ w.reshape(4, 4) + offset, (4,)) - y) ** 2).mean() + 0.1 * (
            w**2
        ).sum()

    def inner(w: Tensors, h: Tensors) -> Tensor:
        return loss(w[0]) + (h[0] * w[0]).sum()

    h = (0.01 * normal(16),)
    (w,) = Minimize().train(inner, (normal(16),), h).params
    arguments: dict[str, Any] = {
        "inner_loss": inner,
        "outer_loss": lambda w, h: (w[0] ** 2).sum(),
        "params": [w],
        "hparams": h,
        "solver": DenseSolve(),
    }
    report = check_hypergradient(**arguments, curvature=JvpOfLayerNorm(loss, w))
    assert "asymmetric Hessian" in names(report)
    assert report.asymmetry > 1e-3
    right = check_hypergradient(**arguments)
    assert right.passed, right


def test_inner_loss_without_a_minimum_is_named() -> None:
    # A bent valley: a line search alone does not end at its lowest point.
    report = check_hypergradient(
        lambda w, h: -((w[0] - h[0]) ** 2) + 1e-3 * w[0] ** 4 + 100 * (w[1] - w[0] ** 2) ** 2,
        lambda w, h: w[0] ** 2 + w[1] ** 2,
        [double(0.0), double(0.0)],
        [double(0.0)],
        solver=DenseSolve(),
        retrain=Minimize(max_iterations=2, newton_steps=0),
    )
    assert "no optimum" in names(report)
    assert "indefinite Hessian" in names(report)


def test_response_that_diverges_is_named(normal: Any) -> None:
    ridge = Ridge(normal)
    report = ridge.check(retrain=lambda h: (torch.full((5,), math.nan),))
    assert names(report)[0] == "no response"


# --- how far the minimum is -----------------------------------------------------------------------


def test_at_the_minimum_nothing_remains(normal: Any) -> None:
    report = Ridge(normal).check()
    assert report.remaining.change < 1e-12
    assert report.remaining.agreement == 1.0
    assert "at their minimum" in str(report)


@pytest.mark.parametrize("size", [0.1, 1.0])
def test_what_remains_of_a_quadratic_is_the_distance_to_its_minimum(normal: Any, size: float) -> None:
    ridge = Ridge(normal)
    params = [ridge.params[0] + size * normal(5)]
    report = ridge.check(params=params)
    away = float((params[0] - ridge.params[0]).norm() / params[0].norm())
    assert report.remaining.change == pytest.approx(away, rel=1e-6)
    assert f"still have to change by {100 * away:.2g} %" in str(report)


def test_hypergradients_that_change_sign_on_the_way_are_counted() -> None:
    """Inner ½(w − e^λ)², outer ½(w − 2)²: dL_V/dλ = (w − 2)e^λ, and w = e^λ is 1, 1, 4 at the minimum."""
    log = [0.0, 0.0, math.log(4.0)]

    def inner(w: Tensors, h: Tensors) -> Tensor:
        return 0.5 * ((w[0] - h[0].exp()) ** 2).sum()

    report = check_hypergradient(
        inner, lambda w, h: 0.5 * ((w[0] - 2) ** 2).sum(), [double(1, 3, 3)], [double(*log)], solver=EXACT
    )
    assert (report.remaining.flipped, report.remaining.compared) == (1, 3)
    assert report.remaining.change == pytest.approx(math.sqrt(5 / 19))
    assert "1 of 3 hypergradients have the other sign" in str(report)


def test_a_fit_that_has_not_converged_is_told_from_one_that_has(normal: Any) -> None:
    """Gradient descent on a network: the model's minimum comes nearer with the steps."""
    x, y = normal(16, 3), normal(16)

    def inner(w: Tensors, h: Tensors) -> Tensor:
        prediction = (x @ w[0]).tanh() @ w[1]
        return ((prediction - y) ** 2).mean() + h[0].exp() * sum((p**2).sum() for p in w)

    def outer(w: Tensors, h: Tensors) -> Tensor:
        return sum(((p - 1) ** 2).sum() for p in w)  # type: ignore[return-value]

    w, h, found = (normal(3, 4), normal(4)), (double(-2.0),), []
    for steps in (20, 600):
        for _ in range(steps):
            w = tuple(p.detach().requires_grad_() for p in w)
            slopes = torch.autograd.grad(inner(w, h), w)
            w = tuple(p.detach() - 0.3 * g for p, g in zip(w, slopes, strict=True))
        report = check_hypergradient(inner, outer, w, h, solver=EXACT, retrain=lambda h, w=w: w)  # type: ignore[misc]
        found.append(report.remaining.change)
    assert found[0] > 0.02
    assert found[1] < 1e-2 * found[0]


def test_around_a_saddle_the_shifted_curvature_serves() -> None:
    """½(w₀ − λ)² − ½w₁² with δ = 1.5: z is 1/2.5 and −1/0.5 of a distance of 1."""

    def inner(w: Tensors, h: Tensors) -> Tensor:
        return 0.5 * ((w[0][0] - h[0]) ** 2 - w[0][1] ** 2).sum()

    report = check_hypergradient(
        inner,
        lambda w, h: w[0].sum(),
        [double(2, 1)],
        [double(1.0)],
        retrain=lambda h: (torch.stack([h[0][0], h[0][0] * 0]),),
        solver=DenseSolve(),
    )
    assert report.remaining.change == pytest.approx(math.hypot(0.4, 2.0) / math.sqrt(5), rel=1e-5)


def test_the_gradient_beside_its_noise(normal: Any) -> None:
    ridge, other = Ridge(normal), Ridge(normal)
    params = [ridge.params[0] + 0.5]
    w = params[0].clone().requires_grad_()
    g = [torch.autograd.grad(r.inner((w,), ridge.hparams), w)[0] for r in (ridge, other)]
    report = ridge.check(params=params, another_batch=other.inner)
    assert report.remaining.signal == pytest.approx(float((g[0] + g[1]).norm() / (g[0] - g[1]).norm()))
    assert "times its noise from batch to batch" in str(report)
    assert math.isnan(ridge.check(params=params).remaining.signal)


# --- arguments ----------------------------------------------------------------------------------


def test_nothing_given_is_changed_and_directions_come_from_the_generator(normal: Any) -> None:
    ridge = Ridge(normal)
    params, hparams = [p.clone() for p in ridge.params], [h.clone() for h in ridge.hparams]
    first, again, other = (
        ridge.check(generator=torch.Generator().manual_seed(seed)).measured for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert all(torch.equal(a, b) for a, b in zip(params, ridge.params, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(hparams, ridge.hparams, strict=True))
    assert not any(x.requires_grad for x in (*ridge.params, *ridge.hparams))
    with torch.no_grad():
        assert ridge.check().passed


def test_report_is_frozen(normal: Any) -> None:
    report = Ridge(normal).check()
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.failures = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"params": []}, "params must be a sequence"),
        ({"hparams": double(1)}, "hparams must be a list of Tensors"),
        ({"hparams": [torch.ones(5, dtype=torch.long)]}, r"hparams\[0\] must be a floating-point tensor"),
        ({"hypergradient": [double(1)]}, "shaped as hparams"),
        ({"num_directions": 0}, "num_directions must be >= 1"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"tolerance": -1.0}, "tolerance must be positive"),
        ({"retrain": lambda h: (h[0], h[0])}, "retrain must return tensors shaped as params"),
    ],
)
def test_bad_arguments_are_refused(normal: Any, change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Ridge(normal).check(**change)


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        (lambda w, h: w[0], ValueError, "one element. Got \\(5,\\)"),
        (lambda w, h: torch.zeros(()), ValueError, "depend on params or hparams"),
        (lambda w, h: (w[0] / 0).sum(), FloatingPointError, "must be finite"),
    ],
)
@pytest.mark.parametrize("which", ["inner", "outer"])
def test_bad_losses_are_refused(normal: Any, loss: Any, error: Any, match: str, which: str) -> None:
    ridge = Ridge(normal)
    setattr(ridge, which, loss)
    with pytest.raises(error, match=f"{which}_loss.*{match}"):
        ridge.check()
