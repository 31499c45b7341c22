"""Problems with answers in closed form, for every solver and every engine.

Each value is derived by hand or in shared float64 references, never by the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DOUBLE = torch.float64


@dataclass(frozen=True)
class Case:
    """An inner and an outer problem at the inner optimum.

    Attributes:
        name: Shown as the test's id.
        inner: Inner loss of (w, λ).
        outer: Outer loss of (w, λ).
        solution: λ ↦ w*(λ).
        hparam: λ.
        hypergradient: dL_V/dλ at λ, exact.
        step_size: α for which the Neumann series converges, below 2/λ_max.
    """

    name: str
    inner: Callable[[Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor], Tensor]
    solution: Callable[[Tensor], Tensor]
    hparam: Tensor
    hypergradient: Tensor
    step_size: float

    def leaves(self) -> tuple[Tensor, Tensor]:
        """w*(λ) and λ as leaves."""
        hparam = self.hparam.clone().requires_grad_(True)
        return self.solution(self.hparam).clone().requires_grad_(True), hparam


def _double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


_DIAGONAL = _double(1.0, 10.0)
_MATRIX = torch.tensor([[5.0, 1.0, 1.0], [1.0, 4.0, 1.0], [1.0, 1.0, 3.0]], dtype=DOUBLE)
_INVERSE = torch.tensor([[0.22, -0.04, -0.06], [-0.04, 0.28, -0.08], [-0.06, -0.08, 0.38]], dtype=DOUBLE)


def ridge_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs and targets, validation inputs and targets of the log-decay case."""
    random = np.random.RandomState(1)
    xt = random.randn(12, 8)
    yt = xt @ np.ones(8) + 2 * random.randn(12)
    xv = random.randn(200, 8)
    yv = xv @ np.ones(8) + 2 * random.randn(200)
    return tuple(torch.from_numpy(a) for a in (xt, yt, xv, yv))  # type: ignore[return-value]


_XT, _YT, _XV, _YV = ridge_data()


def ridge_solution(log_decay: Tensor) -> Tensor:
    """Minimum of ½ mean(Xw − y)² + ½ e^r ‖w‖²."""
    n, d = _XT.shape
    return torch.linalg.solve(_XT.T @ _XT / n + log_decay.exp() * torch.eye(d, dtype=DOUBLE), _XT.T @ _YT / n)


def ridge_inner(w: Tensor, r: Tensor) -> Tensor:
    """½ mean(Xw − y)² + ½ e^r ‖w‖² on the training data."""
    return 0.5 * ((_XT @ w - _YT) ** 2).mean() + 0.5 * r.exp() * (w**2).sum()


def ridge_outer(w: Tensor, r: Tensor) -> Tensor:
    """½ mean(Xw − y)² on the validation data."""
    return 0.5 * ((_XV @ w - _YV) ** 2).mean()


CASES = [
    Case(
        name="scalar ridge",
        inner=lambda w, h: (0.5 * (w - h) ** 2 + 0.5 * w**2).sum(),
        outer=lambda w, h: (0.5 * (w - 2) ** 2).sum(),
        solution=lambda h: h / 2,
        hparam=_double(3.0),
        hypergradient=_double(-0.25),
        step_size=0.4,
    ),
    Case(
        name="diag(1, 10)",
        inner=lambda w, h: 0.5 * (_DIAGONAL * w**2).sum() - (h * w).sum(),
        outer=lambda w, h: 0.5 * ((w - 1) ** 2).sum(),
        solution=lambda h: h / _DIAGONAL,
        hparam=_double(1.0, 1.0),
        hypergradient=_double(0.0, -0.09),
        step_size=0.15,
    ),
    Case(
        name="isotropic trap",
        inner=lambda w, h: (w**2).sum() - (h * w).sum(),
        outer=lambda w, h: 0.5 * ((w - 1) ** 2).sum(),
        solution=lambda h: h / 2,
        hparam=_double(1.0, 1.0, 1.0),
        hypergradient=_double(-0.25, -0.25, -0.25),
        step_size=0.5,
    ),
    Case(
        name="coupled matrix",
        inner=lambda w, h: 0.5 * w @ _MATRIX @ w - h @ w,
        outer=lambda w, h: (w * _double(1.0, 2.0, 3.0)).sum(),
        solution=lambda h: _INVERSE @ h,
        hparam=_double(1.0, 0.0, -1.0),
        hypergradient=_INVERSE @ _double(1.0, 2.0, 3.0),
        step_size=0.3,
    ),
    Case(
        name="log decay",
        inner=ridge_inner,
        outer=ridge_outer,
        solution=ridge_solution,
        hparam=torch.tensor(-2.0, dtype=DOUBLE),
        hypergradient=torch.tensor(0.4007387704, dtype=DOUBLE),
        step_size=0.3,
    ),
    Case(
        name="badly scaled (Bard 1998)",
        # f = ½y² + 500y − 50xy has its minimum at y = 50x − 500; F = (x − 1)² + (y − 1)².
        inner=lambda y, x: (0.5 * y**2 + 500 * y - 50 * x * y).sum(),
        outer=lambda y, x: ((x - 1) ** 2 + (y - 1) ** 2).sum(),
        solution=lambda x: 50 * x - 500,
        hparam=_double(10.0),
        hypergradient=_double(-82.0),
        step_size=0.9,
    ),
]


def cubic_roots(eigenvalue: complex, lr: float, momentum: float, phase: float) -> Tensor:
    """Roots z of (z−1)(z² − 2Re β·z + |β|²) + λz(αz − α Re β) = 0: simultaneous complex momentum on a linear game."""
    c = momentum * math.cos(phase)
    companion = torch.zeros(3, 3, dtype=torch.complex128)
    a2 = -(1 + 2 * c) + lr * eigenvalue
    a1 = momentum**2 + 2 * c - lr * eigenvalue * c
    companion[0] = torch.tensor([-a2, -a1, momentum**2], dtype=torch.complex128)
    companion[1, 0] = companion[2, 1] = 1
    return torch.linalg.eigvals(companion)
