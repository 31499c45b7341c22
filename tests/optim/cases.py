"""Every optimizer with good and bad arguments; whatever runs over all of them takes them from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nested.optim import (
    ComplexAdam,
    ComplexSGD,
    Extragradient,
    ExtrapolationFromThePast,
    GameOptimizer,
    NuPI,
    OptimisticAdam,
    OptimisticSGD,
)


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer as a user makes it.

    Attributes:
        name: Shown as the test's id.
        kind: The class.
        options: Its arguments; they let a quadratic of curvature 0.5 to 2 converge in 400 steps.
        group: Other options, for a second parameter group.
        bad: Arguments out of range, and a part of the error's text.
        buffers: Names in the state after a step.
    """

    name: str
    kind: type[GameOptimizer]
    options: Mapping[str, Any]
    group: Mapping[str, Any]
    bad: tuple[tuple[Mapping[str, Any], str], ...] = ()
    buffers: tuple[str, ...] = ()

    def make(self, params: Any, **options: Any) -> GameOptimizer:
        return self.kind(params, **{**self.options, **options})


COMMON: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"lr": -0.1}, r"lr must be at least 0\. Got -0\.1; to ascend, give maximize=True"),
    ({"lr": math.nan}, r"lr must be finite\. Got nan"),
    ({"lr": math.inf}, r"lr must be finite\. Got inf"),
    ({"lr": "fast"}, r"lr must be a number\. Got 'fast'"),
    ({"lr": None}, r"lr must be a number\. Got None"),
    ({"lr": torch.ones(2)}, r"lr must be a number"),
    ({"weight_decay": -1.0}, r"weight_decay must be at least 0\. Got -1\.0"),
    ({"maximize": 1}, r"maximize must be True or False\. Got 1"),
)
PHASE: tuple[tuple[Mapping[str, Any], str], ...] = (
    (
        {"phase": 22.5},
        r"phase must lie in \[−π, π\], in radians\. Got 22\.5; 22\.5 degrees are phase=0\.392699",
    ),
    ({"phase": math.nan}, r"phase must be finite"),
)
BETAS: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"betas": (0.5, 1.0)}, r"betas\[1\] must lie in \[0, 1\)\. Got 1\.0"),
    ({"betas": (0.5, -0.1)}, r"betas\[1\] must lie in \[0, 1\)"),
    ({"betas": 0.9}, r"betas must be two numbers\. Got 0\.9"),
    ({"betas": (0.9,)}, r"betas must be two numbers"),
    ({"eps": -1e-8}, r"eps must be at least 0"),
)

CASES: tuple[OptimizerCase, ...] = (
    OptimizerCase(
        "ComplexSGD",
        ComplexSGD,
        {"lr": 0.05},
        {"lr": 0.02, "momentum": 0.5, "phase": -1.0, "weight_decay": 0.1},
        (
            ({"momentum": 1.0}, r"momentum must be \|β\| < 1\. Got 1\.0"),
            (
                {"momentum": -0.5},
                r"Got -0\.5; negative momentum is momentum=0\.5 with phase=3\.141593",
            ),
            ({"momentum": math.nan}, r"momentum must be finite"),
            *PHASE,
        ),
        ("momentum_buffer", "momentum_buffer_imag"),
    ),
    OptimizerCase(
        "ComplexSGD-real",
        ComplexSGD,
        {"lr": 0.05, "phase": 0.0},
        {"lr": 0.02, "momentum": 0.5, "phase": 0.5},
        (),
        ("momentum_buffer",),
    ),
    OptimizerCase(
        "ComplexAdam",
        ComplexAdam,
        {"lr": 0.01},
        {"lr": 0.005, "betas": (0.5, 0.99), "phase": 1.0, "weight_decay": 0.1},
        (
            ({"betas": (1.0, 0.999)}, r"betas\[0\] must be \|β\| < 1\. Got 1\.0"),
            ({"betas": (-0.5, 0.999)}, r"negative momentum is"),
            ({"debias": "yes"}, r"debias must be True or False"),
            *PHASE,
            *BETAS,
        ),
        ("exp_avg_sq", "momentum_buffer", "momentum_buffer_imag", "step"),
    ),
    OptimizerCase(
        "ComplexAdam-debias",
        ComplexAdam,
        {"lr": 0.01, "debias": True},
        {"lr": 0.005, "betas": (0.5, 0.99), "debias": False},
        (),
        ("exp_avg_sq", "momentum_buffer", "momentum_buffer_imag", "step"),
    ),
    OptimizerCase("Extragradient", Extragradient, {"lr": 0.1}, {"lr": 0.2, "weight_decay": 0.1}),
    OptimizerCase(
        "ExtrapolationFromThePast",
        ExtrapolationFromThePast,
        {"lr": 0.1},
        {"lr": 0.2, "weight_decay": 0.1},
        (),
        ("anchor",),
    ),
    OptimizerCase(
        "NuPI",
        NuPI,
        {"lr": 0.1, "proportional": 2.0, "nu": 0.3},
        {"lr": 0.05, "proportional": -0.5, "weight_decay": 0.1},
        (
            ({"proportional": math.inf}, r"proportional must be finite"),
            ({"nu": 1.0}, r"nu must lie in \[0, 1\)\. Got 1\.0"),
        ),
        ("smoothed_grad",),
    ),
    OptimizerCase(
        "OptimisticSGD",
        OptimisticSGD,
        {"lr": 0.1},
        {"lr": 0.2, "weight_decay": 0.1},
        (),
        ("previous_grad",),
    ),
    OptimizerCase(
        "OptimisticAdam",
        OptimisticAdam,
        {"lr": 0.01},
        {"lr": 0.02, "betas": (0.5, 0.9), "weight_decay": 0.1},
        (({"betas": (1.0, 0.999)}, r"betas\[0\] must lie in \[0, 1\)"), *BETAS),
        ("exp_avg", "exp_avg_sq", "previous_direction", "step"),
    ),
)

BAD = tuple((case, options, message) for case in CASES for options, message in (*COMMON, *case.bad))


every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Expect the same numbers to the last bit."""
    close(left, right, 0.0)


def close(left: Sequence[Tensor], right: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def game_step(
    optimizers: list[GameOptimizer],
    gradients: Callable[[], None],
) -> None:
    """One update of all optimizers at once, from as many calls of ``gradients`` as they need."""
    gradients()
    looking_ahead = [o for o in optimizers if isinstance(o, Extragradient)]
    if looking_ahead:
        for optimizer in looking_ahead:
            optimizer.extrapolate()
        gradients()
    for optimizer in optimizers:
        optimizer.step()


def follow(optimizer: GameOptimizer, gradients: Callable[[], None], steps: int) -> None:
    """``steps`` updates of one optimizer."""
    for _ in range(steps):
        game_step([optimizer], gradients)


class Quadratic:
    """Σ ½ curvature·(w − 1)² over several tensors of several shapes, with gradients written by hand."""

    def __init__(
        self, *, dtype: torch.dtype = torch.float64, shapes: tuple[tuple[int, ...], ...] = ((3,), (2, 2), ())
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.params = [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for shape in shapes
        ]
        self.curvatures = [
            (0.5 + 1.5 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)
            for shape in shapes
        ]

    def gradients(self) -> None:
        for p, curvature in zip(self.params, self.curvatures, strict=True):
            p.grad = curvature * (p.detach() - 1)

    def loss(self) -> Tensor:
        parts = [(h * (p - 1) ** 2).sum() for p, h in zip(self.params, self.curvatures, strict=True)]
        return torch.stack(parts).sum() / 2

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]
