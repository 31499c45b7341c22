"""The two halves of an extragradient step: called in order, saved in between, undone where the second fails."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lightning_nested.optim import Extragradient
from tests.optim.cases import Quadratic


def test_halves_out_of_order_are_refused() -> None:
    problem = Quadratic()
    optimizer = Extragradient(problem.params, 0.1)
    problem.gradients()
    with pytest.raises(RuntimeError, match=r"Got neither a call of extrapolate\(\) nor a closure"):
        optimizer.step()
    optimizer.extrapolate()
    with pytest.raises(RuntimeError, match=r"Got a second call; recompute the gradients and call step\(\)"):
        optimizer.extrapolate()
    assert optimizer.is_extrapolated
    optimizer.step()
    assert not optimizer.is_extrapolated
    assert not optimizer.state


def test_a_state_saved_between_the_halves_continues() -> None:
    problem, other = Quadratic(), Quadratic()
    optimizer, resumed = Extragradient(problem.params, 0.1), Extragradient(other.params, 0.5)
    problem.gradients()
    optimizer.extrapolate()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(other.params, problem.params, strict=True):
            p.copy_(q)
    assert resumed.is_extrapolated
    for optimizer_, problem_ in ((optimizer, problem), (resumed, other)):
        problem_.gradients()
        optimizer_.step()
    for a, b in zip(problem.values(), other.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_closure_that_fails_at_the_second_call_undoes_the_first_half() -> None:
    problem, calls = Quadratic(), 0
    before = problem.values()
    optimizer = Extragradient(problem.params, 0.1)

    def closure() -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise FloatingPointError("the loss is not finite")
        problem.gradients()
        return 1.0

    with pytest.raises(FloatingPointError):
        optimizer.step(closure)
    for a, b in zip(problem.values(), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not optimizer.is_extrapolated


def test_gradients_that_are_there_in_one_half_only() -> None:
    problem = Quadratic()
    first, second, _ = problem.params
    start = problem.values()
    optimizer = Extragradient(problem.params, 0.1)
    problem.gradients()
    second.grad = None
    optimizer.extrapolate()
    problem.gradients()
    first.grad = None
    gradient = second.grad.clone()
    optimizer.step()
    torch.testing.assert_close(first.detach(), start[0], rtol=0, atol=0)  # back where it was
    torch.testing.assert_close(second.detach(), start[1] - 0.1 * gradient, rtol=0, atol=1e-15)


def test_a_closure_after_extrapolate_finishes_the_step() -> None:
    problem, by_hand, calls = Quadratic(), Quadratic(), 0
    optimizer, manual = Extragradient(problem.params, 0.1), Extragradient(by_hand.params, 0.1)

    def closure() -> float:
        nonlocal calls
        calls += 1
        problem.gradients()
        return 2.0

    problem.gradients()
    optimizer.extrapolate()
    assert optimizer.step(closure) == 2.0
    assert calls == 1
    by_hand.gradients()
    manual.extrapolate()
    by_hand.gradients()
    manual.step()
    for a, b in zip(problem.values(), by_hand.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_memory_of_the_saved_parameters_is_used_again() -> None:
    """By this optimizer alone: copies and loaded states have their own, and a parameter that changes gets another."""
    problem = Quadratic()
    optimizer = Extragradient(problem.params, 0.1)
    w = problem.params[0]

    def half(o: Extragradient, p: Tensor) -> int:
        o.extrapolate()
        return o.state[p]["anchor"].data_ptr()

    problem.gradients()
    address = half(optimizer, w)
    params, twin = copy.deepcopy((problem.params, optimizer))
    loaded = Extragradient(problem.params, 0.1)
    loaded.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert half(optimizer, w) == address
    optimizer.step()
    for other, p in ((twin, params[0]), (loaded, w)):
        assert other.is_extrapolated
        other.step()
        assert half(other, p) != address
        other.step()
    for value in (torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.float32)):
        w.grad = None
        w.data = value
        w.grad = torch.ones_like(value)
        optimizer.extrapolate()
        assert optimizer.state[w]["anchor"].dtype is value.dtype
        optimizer.step()
        torch.testing.assert_close(w.detach(), value.new_full((5,), 0.9))
