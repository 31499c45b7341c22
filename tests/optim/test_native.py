"""The steps in C: equal to the others, whatever the tensors and threads, and one warning where they cannot be had."""

from __future__ import annotations

import math
import multiprocessing
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nested.optim import ComplexAdam, ComplexSGD, GameOptimizer
from lightning_nested.optim.kernels import native
from tests.optim.cases import COMPILER, Quadratic, follow

needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C compiler here")

KINDS: tuple[tuple[type[GameOptimizer], dict[str, Any]], ...] = (
    (ComplexSGD, {"lr": 0.05}),
    (ComplexSGD, {"lr": 0.05, "phase": 0.0}),
    (ComplexSGD, {"lr": 0.05, "phase": math.pi}),
    (ComplexAdam, {"lr": 0.01}),
    (ComplexAdam, {"lr": 0.01, "debias": True, "betas": (0.0, 0.9)}),
)
kinds = pytest.mark.parametrize(("kind", "options"), KINDS)


@pytest.fixture
def afresh() -> Iterator[None]:
    """As in a process that has not compiled yet."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def run(kind: type[GameOptimizer], problem: Quadratic, steps: int = 6, **options: Any) -> list[Tensor]:
    follow(kind(problem.params, **options), problem.gradients, steps)
    return problem.values()


def compare(left: list[Tensor], right: list[Tensor], ulps: float) -> None:
    for a, b in zip(left, right, strict=True):
        tolerance = ulps * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.1, "maximize": True}])
@kinds
def test_equal_to_the_ordinary_step(
    kind: type[GameOptimizer], options: dict[str, Any], more: dict[str, Any], dtype: torch.dtype
) -> None:
    shapes = ((3, 5), (), (0,), (2000,))
    ordinary = run(kind, Quadratic(dtype=dtype, shapes=shapes), **options, **more)
    compiled = run(kind, Quadratic(dtype=dtype, shapes=shapes), **options, **more, compiled=True)
    # a few roundings in each of six steps; g/√v magnifies them where v is the rounding of the first gradients
    compare(compiled, ordinary, 60)


@needs_compiler
@kinds
def test_threads_share_the_work_and_change_nothing(
    kind: type[GameOptimizer], options: dict[str, Any]
) -> None:
    shapes = ((70_000,), (3,), (300_001,), (0,), (40_000,))
    values = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            values.append(run(kind, Quadratic(shapes=shapes), 2, **options, compiled=True))
    finally:
        torch.set_num_threads(threads)
    for other in values[1:]:
        # only the vector loop's tail lies elsewhere
        compare(values[0], other, 4)


def test_shares_cover_every_element_once() -> None:
    shares = native._shares([[0, 100_000], [500_000, 600_000]], [10, 7], 8, 3)
    assert [sum(sizes) for _, sizes in shares] == [6, 6, 5]
    seen = [
        start + 8 * i
        for columns, sizes in shares
        for start, n in zip(columns[1], sizes, strict=True)
        for i in range(n)
    ]
    assert seen == [500_000 + 8 * i for i in range(10)] + [600_000 + 8 * i for i in range(7)]


@needs_compiler
def test_a_forked_process_has_threads_of_its_own() -> None:
    problem = Quadratic(shapes=((300_000,),))
    problem.gradients()
    optimizer = ComplexSGD(problem.params, 0.1, compiled=True)
    threads = torch.get_num_threads()

    def step() -> list[float]:
        # nothing but the step: torch's own threads would not survive the fork either
        optimizer.step()
        return problem.params[0].detach()[:3].tolist()

    try:
        torch.set_num_threads(2)
        step()  # the parent's pool exists now
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=lambda: queue.put(step()), daemon=True)
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get() == step()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_autograd_notices_that_parameters_changed(compiled: bool) -> None:
    w = torch.ones(3, requires_grad=True)
    loss = (w**2).sum()
    w.grad = torch.ones(3)
    before = w._version
    ComplexSGD([w], 0.1, compiled=compiled).step()
    assert w._version > before
    assert w.grad._version == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_compiled_once_for_each_dtype_whatever_changes(afresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: calls.append(a) or real(*a, **k))
    for size in (3, 4):
        layer = nn.Linear(size, 2)
        optimizer = ComplexAdam(layer.parameters(), compiled=True)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(3):
            layer(torch.ones(size)).sum().backward()
            optimizer.step()
            schedule.step()
        ComplexSGD(layer.double().parameters(), 0.1, compiled=True).step()
    assert len(calls) == 2


@pytest.mark.parametrize("fault", ["none", "broken"])
def test_one_warning_without_a_compiler(fault: str, afresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "none":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", "")
        message = r"compiled=True needs a C compiler\. Got: none of cc, gcc and clang is on the PATH\. .* install gcc"
    else:
        monkeypatch.setenv("CC", "false")
        message = r"compiled=True needs a C compiler\. Got: false failed"
    expected = run(ComplexSGD, Quadratic(), lr=0.05)
    with pytest.warns(UserWarning, match=message):
        found = run(ComplexSGD, Quadratic(), lr=0.05, compiled=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(ComplexAdam, Quadratic(), lr=0.05, compiled=True)
    compare(found, expected, 0)
