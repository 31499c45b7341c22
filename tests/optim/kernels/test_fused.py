"""The steps through torch's fused kernels: equal to the ordinary ones, and taken where they are accurate only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nested.optim import ComplexAdam, ComplexSGD, GameOptimizer
from lightning_nested.optim.kernels import fused, walk
from lightning_nested.optim.kernels.fused import Turn
from tests.optim.cases import Quadratic, follow

KINDS: tuple[tuple[type[GameOptimizer], dict[str, Any]], ...] = (
    *((ComplexSGD, {"lr": 0.05, "phase": phase}) for phase in (1e-3, math.pi / 8, -1.0, 2.2, 3.13)),
    (ComplexSGD, {"lr": 0.05, "momentum": 1e-2}),
    (ComplexSGD, {"lr": 0.05, "momentum": 0.99, "phase": 0.1}),
    *((ComplexAdam, {"lr": 0.01, "phase": phase}) for phase in (1e-3, math.pi / 8, -1.0)),
    (ComplexAdam, {"lr": 0.01, "debias": True}),
    (ComplexAdam, {"lr": 0.01, "debias": True, "betas": (0.5, 0.9), "phase": -0.7}),
)
kinds = pytest.mark.parametrize(("kind", "options"), KINDS)

ELSEWHERE: tuple[tuple[type[GameOptimizer], dict[str, Any]], ...] = (
    *((ComplexSGD, {"lr": 0.05, "phase": phase}) for phase in (0.0, 1e-5, 1.1, math.pi / 2, 2.0, math.pi)),
    (ComplexSGD, {"lr": 0.05, "momentum": 0.0}),
    (ComplexSGD, {"lr": 0.05, "momentum": 1e-200}),
    (ComplexAdam, {"lr": 0.01, "phase": 2.2}),
    (ComplexAdam, {"lr": 0.01, "phase": 0.0, "debias": True}),
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the fused kernels in the order they were called."""
    names: list[str] = []

    def counted(name: str, function: Callable[..., None]) -> Callable[..., None]:
        return lambda *args, **options: names.append(name) or function(*args, **options)  # type: ignore[func-returns-value]

    for name in ("_fused_sgd_", "_fused_adam_"):
        monkeypatch.setattr(torch, name, counted(name, getattr(torch, name)))
    return names


def run(kind: type[GameOptimizer], problem: Quadratic, steps: int = 6, **options: Any) -> list[Tensor]:
    """Parameters and buffers after some steps."""
    optimizer = kind(problem.params, **options)
    follow(optimizer, problem.gradients, steps)
    state = [optimizer.state[p] for p in problem.params]
    return [*problem.values(), *(a for s in state for a in s.values() if isinstance(a, Tensor))]


def ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "works", lambda: False)


def compare(left: list[Tensor], right: list[Tensor], ulps: float) -> None:
    for a, b in zip(left, right, strict=True):
        tolerance = ulps * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.1, "maximize": True}])
@kinds
def test_equal_to_the_ordinary_step(
    kind: type[GameOptimizer],
    options: dict[str, Any],
    more: dict[str, Any],
    dtype: torch.dtype,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert fused.works()
    calls.clear()
    monkeypatch.setattr(walk, "TILE", 700)
    monkeypatch.setattr(walk, "SMALL", 10)
    shapes = ((3, 5), (), (0,), (2000,), (4,))
    found = run(kind, Quadratic(dtype=dtype, shapes=shapes), **options, **more)
    # in each step two kernels for each of the 15, the three small ones together, and the three tiles
    assert len(calls) == 2 * 6 * 5, calls
    ordinary(monkeypatch)
    expected = run(kind, Quadratic(dtype=dtype, shapes=shapes), **options, **more)
    assert len(calls) == 2 * 6 * 5
    # a few roundings in each of six steps, as large as sums of buffers of size up to about 5
    compare(found, expected, 120)


@pytest.mark.parametrize(("kind", "options"), ELSEWHERE)
def test_where_errors_would_grow_it_is_not_taken(
    kind: type[GameOptimizer], options: dict[str, Any], calls: list[str]
) -> None:
    assert fused.works()
    calls.clear()
    run(kind, Quadratic(), **options)
    assert not calls


@kinds
def test_the_opposite_phase_gives_the_same_bits(kind: type[GameOptimizer], options: dict[str, Any]) -> None:
    values = []
    for sign in (1, -1):
        problem = Quadratic(shapes=((37,),))
        follow(
            kind(problem.params, **{**options, "phase": sign * options.get("phase", 0.4)}),
            problem.gradients,
            9,
        )
        values.append(problem.values())
    compare(*values, ulps=0)


def test_autograd_notices_that_parameters_changed() -> None:
    w = torch.ones(3, requires_grad=True)
    loss = (w**2).sum()
    w.grad = torch.ones(3)
    before = w._version
    ComplexSGD([w], 0.1).step()
    assert w._version > before
    assert w.grad._version == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_turn_is_a_scaled_rotation() -> None:
    turn = Turn.of(0.6, -0.5)
    assert turn is not None
    a, b = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    turn([a], [b])
    torch.testing.assert_close(a / turn.scale, torch.tensor([0.6, 0.5], dtype=torch.float64))
    torch.testing.assert_close(b, torch.tensor([-0.5, 0.6], dtype=torch.float64))


@pytest.fixture
def untried() -> Iterator[None]:
    """As in a process that has taken no step yet."""
    fused.works.cache_clear()
    yield
    fused.works.cache_clear()


def refuses(*args: Any, **options: Any) -> None:
    raise RuntimeError("params and grads share memory")


@pytest.mark.parametrize("kernel", [None, lambda *args, **options: None, lambda params: None, refuses])
def test_a_torch_without_the_kernels_or_with_others(
    kernel: Callable[..., None] | None, untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fused.works()
    expected = run(ComplexAdam, Quadratic(), lr=0.01)
    fused.works.cache_clear()
    if kernel is None:
        monkeypatch.delattr(torch, "_fused_sgd_")
    else:
        monkeypatch.setattr(torch, "_fused_sgd_", kernel)
    compare(run(ComplexAdam, Quadratic(), lr=0.01), expected, 20)
    assert not fused.works()


@pytest.mark.parametrize("kind", [ComplexSGD, ComplexAdam])
def test_what_a_kernel_cannot_take_goes_the_ordinary_way(
    kind: type[GameOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def params() -> list[Tensor]:
        torch.manual_seed(0)
        return [
            torch.randn(3, 4),
            torch.randn(4, 3).T,
            torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            torch.randn(5, dtype=torch.bfloat16),
            torch.randn(5, dtype=torch.float64),
            torch.randn(6),
        ]

    results = []
    for kernels in (True, False):
        ps = [p.requires_grad_() for p in params()]
        optimizer = kind(ps, lr=0.01)
        if not kernels:
            ordinary(monkeypatch)
        for _ in range(3):
            for p in ps:
                p.grad = p.detach().clone()
            ps[0].grad = torch.imag(torch.complex(ps[0].detach(), -ps[0].detach()).conj())
            assert ps[0].grad.is_neg()
            ps[5].grad = torch.ones(12)[::2]
            optimizer.step()
        results.append([p.detach() for p in ps])
    compare(*results, ulps=60)
