"""The augmented Lagrangian against quadratic programs with known multipliers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nested.games import ConstrainedLoss, Multipliers, augmented_lagrangian
from tests.cases import DOUBLE


def point(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def test_a_step_of_the_penalty_is_the_method_of_multipliers() -> None:
    """λ ← max(0, λ + c g) and ν ← ν + c h, whichever constraints are active."""
    multipliers = Multipliers(3, 2, dtype=DOUBLE)
    g, h, c = point(0.5, -0.1, -3.0), point(0.2, -0.4), 2.0
    with torch.no_grad():
        multipliers.inequality.copy_(point(0.1, 0.3, 0.3))  # type: ignore[union-attr]
        multipliers.equality.copy_(point(-1.0, 1.0))  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(multipliers.parameters(), lr=c, maximize=True)
    problem = ConstrainedLoss(loss=point(1.0).sum(), inequalities=g, equalities=h)
    augmented_lagrangian(problem, multipliers, penalty=c).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    torch.testing.assert_close(multipliers.inequality, point(1.1, 0.1, 0.0), check_dtype=True)
    torch.testing.assert_close(multipliers.equality, point(-0.6, 0.2))


@pytest.mark.parametrize("penalty", [0.5, 4.0])
def test_exact_minimizations_contract_as_predicted(penalty: float) -> None:
    """½q w² subject to aw = e: the error of ν shrinks by 1/(1 + c a²/q) in every round."""
    q, a, e = 3.0, 2.0, 1.0
    multipliers = Multipliers(num_equalities=1, dtype=DOUBLE)
    errors = []
    for _ in range(4):
        assert multipliers.equality is not None
        # w of qw + a(ν + c(aw − e)) = 0
        w = (a * (penalty * e - multipliers.equality.detach()) / (q + penalty * a * a)).requires_grad_()
        problem = ConstrainedLoss(loss=0.5 * q * w.square().sum(), equalities=a * w - e)
        (stationary, ascent) = torch.autograd.grad(
            augmented_lagrangian(problem, multipliers, penalty=penalty), (w, multipliers.equality)
        )
        assert float(stationary.abs()) < 1e-12
        errors.append(float(multipliers.equality.detach() + q * e / a**2))  # ν* = −qe/a²
        with torch.no_grad():
            multipliers.equality += penalty * ascent
    factor = 1 / (1 + penalty * a * a / q)
    assert errors[1:] == pytest.approx([factor * error for error in errors[:-1]], rel=1e-12)


def test_the_penalty_makes_a_saddle_a_minimum() -> None:
    """−½w² subject to w = 0 has no minimum of its Lagrangian; with c > 1 the curvature is c − 1."""
    w = point(0.3).requires_grad_()
    problem = ConstrainedLoss(loss=-0.5 * w.square().sum(), equalities=w)
    value = augmented_lagrangian(problem, Multipliers(num_equalities=1, dtype=DOUBLE), penalty=3.0)
    (slope,) = torch.autograd.grad(value, w, create_graph=True)
    assert float(torch.autograd.grad(slope.sum(), w)[0]) == pytest.approx(2.0)


def test_violation() -> None:
    problem = ConstrainedLoss(loss=point(9.0).sum(), inequalities=point(-1.0, 0.2), equalities=point(-0.5))
    assert float(problem.violation()) == 0.5
    assert float(ConstrainedLoss(loss=point(9.0).sum(), inequalities=point(-1.0)).violation()) == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [({"inequalities": point(1.0, 2.0)}, "Got 2 inequalities for 1"), ({}, "Got 0 inequalities for 1")],
)
def test_as_many_constraints_as_multipliers(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augmented_lagrangian(ConstrainedLoss(loss=point(1.0).sum(), **given), Multipliers(1), penalty=1.0)


def test_no_constraint() -> None:
    with pytest.raises(ValueError, match="There must be a constraint"):
        Multipliers()
