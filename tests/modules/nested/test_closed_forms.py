"""Outer steps of NestedModule against closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lightning_nested.hypergradient import ConjugateGradient, DenseSolve, Identity, Neumann
from lightning_nested.modules import GradientStrategy, Implicit, Unrolled
from tests.modules.nested.problems import Closed, ridge, sgd, steps
from tests.trainers import trainer

A = torch.tensor([1.0, 10.0], dtype=torch.float64)


def diagonal(w: Sequence[float], **kw: Any) -> Closed:
    inner = lambda w, lam: (0.5 * A * w * w - lam * w).sum()  # noqa: E731
    return Closed(inner, lambda w, _: ((w - 1) ** 2 / 2).sum(), w, [1.0, 1.0], **kw)


EXACT = [ConjugateGradient(tolerance=1e-12), DenseSolve(), Neumann(num_terms=200, step_size=0.1)]


@pytest.mark.parametrize("solver", EXACT, ids=lambda s: type(s).__name__)
def test_implicit_moves_by_the_closed_form(solver: Any) -> None:
    assert ridge(gradient=Implicit(solver=solver)).moved().item() == pytest.approx(-0.25, abs=1e-9)
    moved = diagonal([1.0, 0.1], gradient=Implicit(solver=solver)).moved()
    torch.testing.assert_close(moved, torch.tensor([0.0, -0.09], dtype=torch.float64), rtol=0, atol=1e-9)


def test_identity_is_the_wrong_one_of_the_closed_form() -> None:
    moved = diagonal([1.0, 0.1], gradient=Implicit(solver=Identity())).moved()
    torch.testing.assert_close(moved, torch.tensor([0.0, -0.9], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [(1, (-0.09, -0.09)), (5, (-0.2418115599, -0.09)), (50, (-0.0051272138, -0.09))],
)
def test_unrolled_moves_by_the_closed_form(num_steps: int, expected: tuple[float, float]) -> None:
    moved = diagonal([0.0, 0.0], gradient=Unrolled(num_steps=num_steps)).moved(num_steps)
    torch.testing.assert_close(moved, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("gradient", [Implicit(), Unrolled(num_steps=10)], ids=["implicit", "unrolled"])
def test_the_fixed_point_is_the_optimum(gradient: GradientStrategy) -> None:
    """λ's error halves in every outer step, for which w's, divided by 5 in every inner one, is negligible."""
    rates = {"inner_optimizer": sgd(0.4), "outer_optimizer": sgd(2.0)}
    module = ridge(lam=3.0, gradient=gradient, inner_steps_per_outer=10, **rates)
    trainer(limit_val_batches=0).fit(module, steps(400), steps(1))
    assert module.lam.item() == pytest.approx(4.0, abs=1e-8)
    assert module.w.item() == pytest.approx(2.0, abs=1e-8)
    assert (module.inner_steps, module.outer_steps) == (400, 40)
