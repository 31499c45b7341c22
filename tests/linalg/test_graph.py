"""What autograd answers wrongly is refused by name, and hooks see the training's gradient only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_nested.games import game_jacobian
from lightning_nested.hypergradient import (
    ConjugateGradient,
    DoubleBackwardError,
    FiniteDifference,
    Hessian,
    HessianOperator,
    implicit_hypergradient,
    unrolled_hypergradient,
)
from lightning_nested.linalg.first_derivatives import first_derivative
from lightning_nested.linalg.graph import (
    explain_double_backward,
    hides_layers,
    infinite_operations,
    without_hooks,
)
from tests.cases import DOUBLE

X = torch.linspace(-1, 1, 12, dtype=DOUBLE).reshape(4, 3)


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(DOUBLE)


def checkpointed(module: nn.Module, *, reentrant: bool) -> Tensor:
    out: Tensor = checkpoint(module, X.clone().requires_grad_(), use_reentrant=reentrant)
    return out.tanh().pow(2).mean()


def regularized(loss: Tensor, module: nn.Module, h: Tensor) -> Tensor:
    return loss + (h * sum(p.pow(2).sum() for p in module.parameters())).sum()


@pytest.mark.parametrize("place", ["inner", "outer"])
def test_reentrant_checkpointing_hides_layers_from_second_derivatives_alone(place: str) -> None:
    module, h = layer(), torch.ones((), dtype=DOUBLE, requires_grad=True)
    params = list(module.parameters())

    def inner(*, reentrant: bool = place == "inner") -> Tensor:
        return regularized(checkpointed(module, reentrant=reentrant), module, h)

    def outer(*, reentrant: bool = place == "outer") -> Tensor:
        return checkpointed(module, reentrant=reentrant)

    assert hides_layers(inner()) is (place == "inner")
    for p in params:
        p.grad = torch.full_like(p, 7.0)
    solver = ConjugateGradient(tolerance=1e-10)
    plain = inner(reentrant=False), outer(reentrant=False)
    (expected,) = implicit_hypergradient(*plain, params, [h], solver=solver)
    (found,) = implicit_hypergradient(
        inner, outer(), params, [h], solver=solver, curvature=FiniteDifference()
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert all(bool((p.grad == 7.0).all()) for p in params)
    if place == "inner":
        with pytest.raises(DoubleBackwardError, match="use_reentrant=False"):
            implicit_hypergradient(inner(), outer(), params, [h], curvature=Hessian())
    else:  # from several processes
        with pytest.raises(DoubleBackwardError, match="use_reentrant=False"):
            implicit_hypergradient(inner(), outer(), params, [h], reduce=lambda x: x)


def test_hidden_layers_leave_hooks_and_gradients_alone() -> None:
    module, seen = layer(), []
    module.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    weight, bias = (
        first_derivative(checkpointed(module, reentrant=True), (module.weight,), (module.bias,)),
        module.bias,
    )
    expected = torch.autograd.grad(checkpointed(module, reentrant=False), module.weight)
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)
    assert seen == []
    assert module.weight.grad is None
    assert bias.grad is None
    checkpointed(module, reentrant=True).backward()
    assert len(seen) == 1
    moved = (module.weight * 1.0,)
    with pytest.raises(DoubleBackwardError, match="use_reentrant=False"):
        first_derivative(checkpointed(module, reentrant=True), moved)


def test_weight_norm_has_a_wrong_second_derivative_but_serves_differences() -> None:
    v = torch.randn(4, 3, dtype=DOUBLE, requires_grad=True)
    g = torch.rand(4, 1, dtype=DOUBLE, requires_grad=True)
    inputs = (v, g)
    # Where this passes, torch has mended it, and the refusal can go.
    assert not torch.autograd.gradgradcheck(
        lambda v, g: torch._weight_norm(v, g, 0), inputs, raise_exception=False
    )
    module, h = parametrizations.weight_norm(layer()), torch.ones((), dtype=DOUBLE, requires_grad=True)
    params = tuple(module.parameters())

    def inner() -> Tensor:
        return regularized(module(X).tanh().pow(2).mean(), module, h)

    with pytest.raises(DoubleBackwardError, match=r"Got weight_norm.*FiniteDifference"):
        implicit_hypergradient(inner(), module(X).mean(), params, [h])
    with pytest.raises(DoubleBackwardError, match="Got weight_norm"):
        game_jacobian([inner()], [list(params)])
    with pytest.raises(DoubleBackwardError, match="Got weight_norm"):
        unrolled_hypergradient(step_of(module), lambda p, h: p[0].sum(), params, [h], num_steps=1)
    implicit_hypergradient(
        inner, module(X).mean(), params, [h], curvature=FiniteDifference(), solver=ConjugateGradient()
    )


def step_of(module: nn.Module) -> Any:
    names = [name for name, _ in module.named_parameters()]

    def step(params: tuple[Tensor, ...], hparams: tuple[Tensor, ...], t: int) -> tuple[Tensor, ...]:
        out = torch.func.functional_call(module, dict(zip(names, params, strict=True)), X)
        gradient = torch.autograd.grad(
            hparams[0] * out.pow(2).mean(), params, create_graph=True, allow_unused=True
        )
        return tuple(p if g is None else p - 0.1 * g for p, g in zip(params, gradient, strict=True))

    return step


def test_hooks_do_not_act_on_products() -> None:
    w = torch.tensor([1.0, 2.0], dtype=DOUBLE, requires_grad=True)
    h = torch.tensor([2.0, 3.0], dtype=DOUBLE, requires_grad=True)
    seen: list[Tensor] = []

    def solve(loss: Tensor) -> Tensor:
        (found,) = implicit_hypergradient(
            loss, ((w - 2) ** 2).sum(), [w], [h], solver=ConjugateGradient(max_iterations=5, tolerance=0.0)
        )
        return found

    plain = solve((h * w**2).sum())
    handle = w.register_hook(lambda g: (seen.append(g), 0.1 * g)[1])
    loss = (h * w**2).sum()
    assert torch.equal(solve(loss), plain)
    assert not seen
    loss.backward()
    assert len(seen) == 1
    torch.testing.assert_close(w.grad, 0.1 * 2 * (h * w).detach())
    handle.remove()
    assert not w._backward_hooks


def test_hooks_come_back_after_an_error() -> None:
    w = torch.ones(2, requires_grad=True)
    w.register_hook(lambda g: 2 * g)
    assert torch.equal(torch.autograd.grad(w.sum(), w)[0], 2 * torch.ones(2))
    with pytest.raises(RuntimeError), without_hooks([w, torch.ones(1)]):
        torch.autograd.grad(w.detach().sum(), w)
    assert torch.equal(torch.autograd.grad(w.sum(), w)[0], 2 * torch.ones(2))


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (lambda w: w.norm(), "LinalgVectorNorm"),
        (lambda w: w.pow(2).sum().pow(0.75), "Pow"),
        (lambda w: (w**2).sum(), ""),
        (lambda w: w.detach().sum(), ""),
    ],
)
def test_infinite_second_derivatives_are_named(loss: Any, name: str) -> None:
    w = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    assert infinite_operations(loss(w), [w]) == name


def test_an_infinite_second_derivative_has_the_right_cure() -> None:
    w = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    h = torch.ones((), dtype=DOUBLE, requires_grad=True)
    for solver in (ConjugateGradient(), None):
        with pytest.raises(FloatingPointError, match=r"LinalgVectorNorm.*FiniteDifference\(\)"):
            implicit_hypergradient((w * h).norm(), (w - 1).sum(), [w], [h], solver=solver)


def test_complex_tensors_are_refused() -> None:
    w = torch.ones(2, dtype=torch.cdouble, requires_grad=True)
    h = torch.ones((), dtype=DOUBLE, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"params\[0\] must be a real floating-point tensor\. Got torch.complex128"
    ):
        implicit_hypergradient((h * w.abs() ** 2).sum(), w.abs().sum(), [w], [h])


def test_a_checkpointed_layer_that_runs_otherwise_again_is_explained() -> None:
    module, runs = layer(), iter((True, False))

    def forward(x: Tensor) -> Tensor:
        return module(x).tanh() if next(runs) else module(x)

    loss = checkpoint(forward, X, use_reentrant=False).mean()
    with (
        pytest.raises(DoubleBackwardError, match=r"around the whole of trainer\.fit"),
        explain_double_backward(),
    ):
        torch.autograd.grad(loss, list(module.parameters()))


def test_products_refuse_the_same_as_hypergradients() -> None:
    module = layer()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        HessianOperator(
            checkpointed(module, reentrant=True) + module.weight.sum(), tuple(module.parameters())
        )
