"""Every row of the hypergradient references, on every solver that applies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_nested.hypergradient import (
    ConjugateGradient,
    DenseSolve,
    DiagonalOperator,
    DoubleBackwardError,
    FiniteDifference,
    GaussNewton,
    Hessian,
    Identity,
    InverseSolver,
    Neumann,
    Nystrom,
    implicit_hypergradient,
    implicit_result,
    inner_curvature,
)
from lightning_nested.linalg.curvature import HessianOperator
from lightning_nested.linalg.vectors import flatten
from tests.cases import CASES, DOUBLE, Case, ridge_inner, ridge_outer, ridge_solution

TIGHT = 1e-8  # exact or converged solves in float64; the references have ten digits


def exact_solvers(case: Case) -> list[InverseSolver]:
    return [
        ConjugateGradient(tolerance=1e-14),
        Neumann(num_terms=3000, step_size=case.step_size),
        Neumann(num_terms=3000),
        Neumann(num_terms=3000, tolerance=1e-13),
        Nystrom(rank=100, damping=0.0),
        DenseSolve(),
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize(
    "index", range(6), ids=["CG", "Neumann", "Neumann auto", "Neumann tol", "Nystrom", "Dense"]
)
def test_exact_solvers_give_the_reference(case: Case, index: int) -> None:
    w, h = case.leaves()
    solver = exact_solvers(case)[index]
    (gradient,) = implicit_hypergradient(case.inner(w, h), case.outer(w, h), [w], [h], solver=solver)
    torch.testing.assert_close(gradient, case.hypergradient, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_finite_differences_need_no_second_derivative(case: Case) -> None:
    # Quadratic inner losses but for e^r: central differences are exact up to rounding, about eps^(2/3).
    w, h = case.leaves()
    (gradient,) = implicit_hypergradient(
        lambda: case.inner(w, h),
        case.outer(w, h),
        [w],
        [h],
        solver=ConjugateGradient(tolerance=1e-12),
        curvature=FiniteDifference(),
    )
    torch.testing.assert_close(gradient, case.hypergradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_given_curvature_is_any_matrix(case: Case) -> None:
    w, h = case.leaves()
    matrix = torch.autograd.functional.hessian(lambda v: case.inner(v, h), w.detach()).reshape(
        w.numel(), w.numel()
    )
    (gradient,) = implicit_hypergradient(
        case.inner(w, h),
        case.outer(w, h),
        [w],
        [h],
        solver=ConjugateGradient(tolerance=1e-14),
        curvature=matrix,
    )
    torch.testing.assert_close(gradient, case.hypergradient, rtol=TIGHT, atol=TIGHT)
    (gradient,) = implicit_hypergradient(
        case.inner(w, h), case.outer(w, h), [w], [h], solver=torch.linalg.inv(matrix)
    )
    torch.testing.assert_close(gradient, case.hypergradient, rtol=TIGHT, atol=TIGHT)


def diag() -> tuple[Case, Tensor, Tensor]:
    case = next(c for c in CASES if c.name == "diag(1, 10)")
    return (case, *case.leaves())


def test_identity_is_the_plain_gradient_without_a_step_size() -> None:
    case, w, h = diag()
    (gradient,) = implicit_hypergradient(case.inner(w, h), case.outer(w, h), [w], [h], solver=Identity())
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.9], dtype=DOUBLE), rtol=0, atol=1e-15)


@pytest.mark.parametrize("terms", [0, 1, 2, 7])
def test_neumann_carries_the_factor_alpha(terms: int) -> None:
    # ∂L_V/∂w = (0, −0.9) lies along the eigenvalue 10 = 1/α, which the zeroth term already solves.
    case, w, h = diag()
    solver = Neumann(num_terms=terms, step_size=0.1)
    (gradient,) = implicit_hypergradient(case.inner(w, h), case.outer(w, h), [w], [h], solver=solver)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.09], dtype=DOUBLE), rtol=0, atol=1e-15)


def test_conjugate_gradient_is_invariant_to_the_scale_of_the_losses() -> None:
    case, w, h = diag()
    for scale in (1e-6, 1.0, 1e6):
        (gradient,) = implicit_hypergradient(
            scale * case.inner(w, h),
            scale * case.outer(w, h),
            [w],
            [h],
            solver=ConjugateGradient(tolerance=1e-14),
        )
        torch.testing.assert_close(gradient / scale, case.hypergradient, rtol=TIGHT, atol=TIGHT)


def test_log_decay_minimum_is_a_zero_of_the_hypergradient() -> None:
    r = torch.tensor(-3.3618787372, dtype=DOUBLE, requires_grad=True)
    w = ridge_solution(r.detach()).requires_grad_(True)
    outer = ridge_outer(w, r)
    assert float(outer.detach()) * 2 == pytest.approx(2 * 3.6336832439, abs=1e-9)
    (gradient,) = implicit_hypergradient(ridge_inner(w, r), outer, [w], [r], solver=DenseSolve())
    assert abs(float(gradient)) < TIGHT


def test_log_decay_value_at_minus_two() -> None:
    r = torch.tensor(-2.0, dtype=DOUBLE)
    assert float(ridge_outer(ridge_solution(r), r)) == pytest.approx(3.8537734400, abs=1e-9)


def test_scalar_ridge_descends_to_its_optimum() -> None:
    case = CASES[0]
    h = case.hparam.clone().requires_grad_(True)
    for _ in range(200):
        w = case.solution(h.detach()).requires_grad_(True)
        (gradient,) = implicit_hypergradient(
            case.inner(w, h), case.outer(w, h), [w], [h], solver=ConjugateGradient()
        )
        with torch.no_grad():
            h -= 0.5 * gradient
    assert float(h.detach()) == pytest.approx(4.0, abs=1e-9)


def test_bard_optimum() -> None:
    case = CASES[-1]
    h = torch.tensor([10.0163934426], dtype=DOUBLE, requires_grad=True)
    w = case.solution(h.detach()).requires_grad_(True)
    assert float(w.detach()) == pytest.approx(0.8196721311, abs=1e-7)
    assert float(case.outer(w, h).detach()) == pytest.approx(81.3278688525, abs=1e-8)
    (gradient,) = implicit_hypergradient(
        case.inner(w, h), case.outer(w, h), [w], [h], solver=ConjugateGradient()
    )
    # The slope of the hypergradient is 2 + 2·50² and λ* has ten decimals.
    assert abs(float(gradient)) < 5002 * 1e-10 + 1e-7


def test_direct_derivative_is_added() -> None:
    case = CASES[0]
    w, h = case.leaves()
    outer = case.outer(w, h) + (3.0 * h).sum()
    (gradient,) = implicit_hypergradient(case.inner(w, h), outer, [w], [h], solver=DenseSolve())
    torch.testing.assert_close(gradient, case.hypergradient + 3.0, rtol=0, atol=1e-14)


# ---- a K-step series is K unrolled steps


def test_terms_of_the_series_are_unrolled_steps() -> None:
    case, w, h = diag()
    for steps in (1, 3, 10):
        fast = w
        for _ in range(steps):
            (g,) = torch.autograd.grad(case.inner(fast, h), fast, create_graph=True)
            fast = fast - 0.07 * g
        (unrolled,) = torch.autograd.grad(case.outer(fast, h), h)
        solver = Neumann(num_terms=steps - 1, step_size=0.07)
        (series,) = implicit_hypergradient(case.inner(w, h), case.outer(w, h), [w], [h], solver=solver)
        torch.testing.assert_close(series, unrolled, rtol=1e-14, atol=1e-15)


# ---- refusals


def test_a_learning_rate_is_refused_and_unrolling_is_named() -> None:
    w = torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)
    rate = torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)
    with pytest.raises(ValueError, match="unrolled_hypergradient"):
        implicit_hypergradient(0.5 * w**2, (w - 1) ** 2, [w], [rate])
    with pytest.raises(ValueError, match="only the outer loss"):
        implicit_hypergradient(0.5 * w**2, (w - 1) ** 2 + rate, [w], [rate])


@pytest.mark.parametrize(
    "solver", [Neumann(num_terms=5), ConjugateGradient(), Nystrom(rank=1), DenseSolve(), Identity()]
)
def test_zero_outer_gradient_gives_zero(solver: InverseSolver) -> None:
    w = torch.tensor([2.0], dtype=DOUBLE, requires_grad=True)
    h = torch.tensor([4.0], dtype=DOUBLE, requires_grad=True)
    (gradient,) = implicit_hypergradient((w**2 - h * w).sum(), ((w - 2) ** 2).sum(), [w], [h], solver=solver)
    assert float(gradient) == 0.0


def test_bad_arguments() -> None:
    w = torch.ones(2, requires_grad=True)
    h = torch.ones(2, requires_grad=True)

    def inner() -> Tensor:
        return (w * h).sum() ** 2

    def outer() -> Tensor:
        return (w**2).sum()

    with pytest.raises(ValueError, match="scalar"):
        implicit_hypergradient(w * h, outer(), [w], [h])
    with pytest.raises(ValueError, match="graph"):
        implicit_hypergradient(inner().detach(), outer(), [w], [h])
    with pytest.raises(ValueError, match="at least one"):
        implicit_hypergradient(inner(), outer(), [], [h])
    with pytest.raises(ValueError, match="at least one"):
        implicit_hypergradient(inner(), outer(), [w], [])
    with pytest.raises(ValueError, match="different tensors"):
        implicit_hypergradient(inner(), outer(), [w], [w])
    with pytest.raises(ValueError, match="require gradients"):
        implicit_hypergradient(inner(), outer(), [w], [torch.ones(2)])
    with pytest.raises(FloatingPointError, match="outer_loss must be finite"):
        implicit_hypergradient(inner(), outer() * float("nan"), [w], [h])
    with pytest.raises(TypeError, match="function without arguments"):
        implicit_hypergradient(inner(), outer(), [w], [h], curvature=FiniteDifference())
    with pytest.raises(TypeError, match="`A @ v`"):
        implicit_hypergradient(inner(), outer(), [w], [h], curvature=object())  # type: ignore[arg-type]


class NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return 2 * x * g


def test_an_operation_without_second_derivative_is_named_with_both_ways_out() -> None:
    w = torch.tensor([1.0], dtype=DOUBLE, requires_grad=True)
    h = torch.tensor([2.0], dtype=DOUBLE, requires_grad=True)

    def inner() -> Tensor:
        return (NoDoubleBackward.apply(w) - h * w).sum()

    with pytest.raises(DoubleBackwardError, match="FiniteDifference") as error:
        implicit_hypergradient(inner(), ((w - 2) ** 2).sum(), [w], [h], solver=ConjugateGradient())
    assert "MATH" in str(error.value)
    (gradient,) = implicit_hypergradient(
        inner, ((w - 2) ** 2).sum(), [w], [h], solver=ConjugateGradient(), curvature=FiniteDifference()
    )
    assert float(gradient) == pytest.approx(-1.0, abs=1e-6)  # w* = h/2


def test_flash_attention_without_second_derivative_is_explained() -> None:
    torch.manual_seed(0)
    w = torch.randn(1, 1, 8, 16, requires_grad=True)
    h = torch.ones((), requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        loss = (h * nn.functional.scaled_dot_product_attention(w, w, w)).sum()
    with pytest.raises(DoubleBackwardError, match=r"attention.*FiniteDifference"):
        implicit_hypergradient(loss, (w**2).sum(), [w], [h], solver=Neumann(num_terms=1, step_size=0.1))


# ---- operators compose with real networks


def tiny(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    if kind == "conv + BatchNorm":
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 2)
        )
        return net.to(DOUBLE), torch.randn(8, 1, 6, 6, dtype=DOUBLE)
    if kind == "LSTM":

        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.lstm(x)[0][:, -1])

        return Recurrent().to(DOUBLE), torch.randn(8, 5, 3, dtype=DOUBLE)
    if kind == "attention":

        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

        return Attention().to(DOUBLE), torch.randn(8, 5, 4, dtype=DOUBLE)

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(
                4, 2, dim_feedforward=6, dropout=0.0, batch_first=True, activation="gelu"
            )
            self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return self.head(self.encoder(x).mean(1))

    return Transformer().to(DOUBLE), torch.randn(8, 5, 4, dtype=DOUBLE)


@pytest.mark.parametrize(
    "kind", ["conv + BatchNorm", "LSTM", "attention", pytest.param("transformer", marks=pytest.mark.slow)]
)
def test_networks_against_central_differences_of_the_retrained_response(kind: str) -> None:
    """dL_V(w*(r))/dr at r = log decay, with w* re-trained by Newton's method at r ± ε."""
    net, x = tiny(kind)
    y = torch.arange(8) % 2
    xv, yv = x.flip(0) + 0.1 * torch.randn_like(x), (torch.arange(8) + 1) % 2
    params = tuple(net.parameters())
    r = torch.tensor(-4.0, dtype=DOUBLE, requires_grad=True)

    def inner() -> Tensor:
        return nn.functional.cross_entropy(net(x), y) + 0.5 * r.exp() * sum((p**2).sum() for p in params)

    def outer() -> Tensor:
        return nn.functional.cross_entropy(net(xv), yv)

    def retrain() -> float:
        """Damped Newton steps to a gradient of rounding size; returns its norm."""
        size = float("inf")
        for _ in range(60):
            gradient = torch.autograd.grad(inner(), params)
            size = float(torch.cat([g.flatten() for g in gradient]).norm())
            if size < 1e-11:
                break
            result = implicit_result(
                inner(),
                sum((p * g).sum() for p, g in zip(params, gradient, strict=False)),
                params,
                [r],
                solver=ConjugateGradient(max_iterations=400, tolerance=1e-10),
                allow_unused=True,
            )
            here = [p.detach().clone() for p in params]
            before, length = float(inner().detach()), 1.0
            while True:  # backtracking
                with torch.no_grad():
                    for p, h, s in zip(params, here, result.solution.x, strict=True):
                        p.copy_(h - length * s)
                if float(inner().detach()) <= before + 1e-14 or length < 1e-6:
                    break
                length /= 2
        return size

    optimizer = torch.optim.Adam(params, lr=0.02)
    for _ in range(1500):
        optimizer.zero_grad()
        inner().backward()
        optimizer.step()
    assert retrain() < 1e-10
    home = [p.detach().clone() for p in params]
    gradients = {
        name: implicit_hypergradient(
            inner if callable_ else inner(), outer(), params, [r], solver=solver, curvature=curvature
        )[0]
        for name, solver, curvature, callable_ in [
            ("CG", ConjugateGradient(max_iterations=500, tolerance=1e-12), Hessian(), False),
            ("dense", DenseSolve(), Hessian(), False),
            ("differences", ConjugateGradient(max_iterations=500, tolerance=1e-9), FiniteDifference(), True),
        ]
    }
    epsilon, values = 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, h in zip(params, home, strict=True):
                p.copy_(h)
            r += sign * epsilon
        assert retrain() < 1e-10
        values.append(float(outer().detach()))
        with torch.no_grad():
            r -= sign * epsilon
    truth = (values[0] - values[1]) / (2 * epsilon)
    assert abs(truth) > 1e-3  # the test has something to see
    # Truncation of the difference is O(ε²) = 1e-8 times third derivatives of order one.
    assert float(gradients["CG"]) == pytest.approx(truth, rel=1e-6, abs=1e-8)
    assert float(gradients["dense"]) == pytest.approx(truth, rel=1e-6, abs=1e-8)
    assert float(gradients["differences"]) == pytest.approx(truth, rel=1e-5, abs=1e-7)


def test_gauss_newton_is_the_hessian_of_a_linear_model() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3).to(DOUBLE)
    x, y = torch.randn(10, 4, dtype=DOUBLE), torch.arange(10) % 3
    outputs = net(x)
    loss = nn.functional.cross_entropy(outputs, y)
    params = tuple(net.parameters())
    exact = Hessian().linearize(loss, params).curvature
    approximate = GaussNewton(outputs=outputs).linearize(loss, params).curvature
    v = tuple(torch.randn_like(p) for p in params)
    for a, b in zip(exact @ v, approximate @ v, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gauss_newton_against_a_written_out_jacobian() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(DOUBLE)
    x, y = torch.randn(10, 4, dtype=DOUBLE), torch.arange(10) % 3
    params = tuple(net.parameters())
    names = [n for n, _ in net.named_parameters()]
    outputs = net(x)
    loss = nn.functional.cross_entropy(outputs, y)
    operator = GaussNewton(outputs=outputs).linearize(loss, params).curvature

    def forward(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (x,)).flatten()

    jacobian = torch.cat([j.reshape(30, -1) for j in torch.autograd.functional.jacobian(forward, params)], 1)
    inner = torch.autograd.functional.hessian(
        lambda o: nn.functional.cross_entropy(o.view(10, 3), y), outputs.detach().flatten()
    )
    dense = jacobian.T @ inner @ jacobian
    flat = torch.randn(dense.shape[0], dtype=DOUBLE)
    torch.testing.assert_close(operator @ flat, dense @ flat, rtol=1e-11, atol=1e-13)
    assert float(torch.linalg.eigvalsh(dense)[0]) > -1e-12


def test_damping_and_decay_are_added_operators() -> None:
    case, w, h = diag()
    operator = (
        Hessian().linearize(case.inner(w, h), (w,)).curvature
        + DiagonalOperator([torch.tensor([1.0, 2.0])]) * 2.0
    )
    v = (torch.tensor([1.0, 1.0], dtype=DOUBLE),)
    torch.testing.assert_close((operator @ v)[0], torch.tensor([3.0, 14.0], dtype=DOUBLE))
    torch.testing.assert_close(
        (operator + DiagonalOperator(0.5)) @ v[0], torch.tensor([3.5, 14.5], dtype=DOUBLE)
    )


def test_shared_gradient_tensors_are_not_written_twice() -> None:
    # autograd returns one tensor for both parameters here; adding damping in place must not double it.
    a = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    b = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    operator = Hessian().linearize(0.5 * ((a + b) ** 2).sum(), (a, b)).curvature + DiagonalOperator(1.0)
    v = (torch.tensor([1.0, 0.0], dtype=DOUBLE), torch.tensor([0.0, 0.0], dtype=DOUBLE))
    first, second = operator @ v
    assert first.tolist() == [2.0, 0.0]
    assert second.tolist() == [1.0, 0.0]
    assert v[0].tolist() == [1.0, 0.0]


def test_the_training_graph_survives_a_hypergradient() -> None:
    case, w, h = diag()
    loss = case.inner(w, h)
    implicit_hypergradient(loss, case.outer(w, h), [w], [h])
    loss.backward()
    assert w.grad is not None
    assert np.isfinite(w.grad.numpy()).all()


def test_finite_differences_move_by_what_autocast_can_resolve(generator: torch.Generator) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    w = tuple(net.parameters())
    x, y = torch.randn(64, 4, generator=generator), torch.randn(64, 1, generator=generator)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ((net(x) - y).float() ** 2).mean()

    v = tuple(torch.randn(p.shape, generator=generator) for p in w)
    exact = flatten(HessianOperator(((net(x) - y) ** 2).mean(), w) @ v)

    def error(epsilon: float | None) -> float:
        product = FiniteDifference(epsilon=epsilon).linearize(loss, w).curvature @ v
        return float((flatten(product) - exact).norm() / exact.norm())

    # float32's own length divides bfloat16's rounding by 0.0025: an error above 20 %.
    assert error(torch.finfo(torch.float32).eps ** (1 / 3) / 2) > 0.2
    assert error(None) < 0.1  # half the cube root of bfloat16's epsilon, whatever ‖w‖ is


@pytest.mark.parametrize("place", ["curvature", "solver", "preconditioner"])
@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (torch.eye(2, dtype=DOUBLE), r"shape \(3,\). Got Tensor of shape \(2, 2\)"),
        (torch.eye(3), "torch.float64 on cpu. Got torch.float32 on cpu"),
        (torch.eye(3, dtype=DOUBLE, device="meta"), "Got torch.float64 on meta"),
    ],
)
def test_given_operators_of_other_sizes_and_kinds(place: str, operator: Tensor, message: str) -> None:
    w = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    lam = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    options: dict[str, Any] = {place: operator}
    if place == "preconditioner":
        options = {"solver": ConjugateGradient(preconditioner=operator)}
    with pytest.raises(ValueError, match=message):
        implicit_hypergradient(0.5 * ((w - lam) ** 2).sum(), ((w - 2) ** 2).sum(), [w], [lam], **options)


def test_sparse_gradients_are_refused() -> None:
    table = torch.ones(4, 2, requires_grad=True)
    lam = torch.ones(2, requires_grad=True)
    index = torch.tensor([0, 1])

    def loss() -> Tensor:
        return (nn.functional.embedding(index, table, sparse=True) * lam).pow(2).mean()

    for curvature in (None, FiniteDifference()):
        with pytest.raises(ValueError, match="sparse=False"):
            implicit_hypergradient(loss, loss(), [table], [lam], curvature=curvature)
    dense = table.pow(2).mean()
    with pytest.raises(ValueError, match="sparse=False"):
        implicit_hypergradient(loss, dense, [table], [lam], solver=Identity())


def test_a_compiled_model_is_explained() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    compiled = torch.compile(net, backend="aot_eager")
    w = tuple(net.parameters())
    lam = torch.ones((), requires_grad=True)
    x = torch.ones(3, 2)

    def inner() -> Tensor:
        return lam * (compiled(x) ** 2).mean()

    with pytest.raises(DoubleBackwardError, match=r"no torch.compile.*FiniteDifference\(\)"):
        implicit_hypergradient(inner(), net(x).mean(), w, [lam])
    (found,) = implicit_hypergradient(
        inner, net(x).mean(), w, [lam], curvature=FiniteDifference(), solver=Identity()
    )
    (exact,) = implicit_hypergradient(lam * (net(x) ** 2).mean(), net(x).mean(), w, [lam], solver=Identity())
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-4)


def test_gauss_newton_builds_a_second_graph_only_for_hyperparameters(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3).to(DOUBLE)
    x, y = torch.randn(10, 4, dtype=DOUBLE), torch.arange(10) % 3
    h, params = torch.ones((), dtype=DOUBLE, requires_grad=True), tuple(net.parameters())
    graphs: list[int] = []
    original = inner_curvature.gradient_with_graph

    def counted(*args: Any) -> Any:
        graphs.append(1)
        return original(*args)

    monkeypatch.setattr(inner_curvature, "gradient_with_graph", counted)
    for tuned in (False, True):
        graphs.clear()
        outputs = net(x)
        loss = nn.functional.cross_entropy(outputs, y) * (h if tuned else 1.0)
        expected = torch.autograd.grad(loss, params, retain_graph=True)
        problem = GaussNewton(outputs=outputs).linearize(loss, params)
        assert len(graphs) == tuned
        for found, exact in zip(problem.gradient, expected, strict=True):
            assert not found.requires_grad
            torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
        (mixed,) = problem.mixed(expected, (h,))
        assert (mixed is not None) is tuned
