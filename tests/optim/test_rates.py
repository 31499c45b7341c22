"""The optimizers' rates on linear games, measured and predicted.

The predictions are made here, from the definitions: an optimizer on a game with a linear gradient field A·w is a
linear map of (buffers, w), and its rate is the spectral radius of that matrix.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from lightning_nested.optim import (
    ComplexAdam,
    ComplexSGD,
    Extragradient,
    ExtrapolationFromThePast,
    GameOptimizer,
    OptimisticAdam,
    OptimisticSGD,
)
from tests.optim.cases import game_step

DOUBLE = torch.float64

Blocks = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(A, D) -> the matrix of one player's update of (buffers, w); D projects on that player's coordinates."""


def complex_map(lr: float, momentum: float, phase: float, factor: complex = 1.0) -> Blocks:
    """μ ← μ + D((β − 1)μ − Aw), w ← w + lr·D·Re(factor·μ), on (Re μ, Im μ, w)."""
    beta = cmath.rect(momentum, phase)

    def matrix(A: np.ndarray, D: np.ndarray) -> np.ndarray:
        unit, zero = np.eye(len(A)), np.zeros_like(A)
        c, s = (beta.real - 1) * D, beta.imag * D
        moments = np.block([[unit + c, -s, -D @ A], [s, unit + c, zero], [zero, zero, unit]])
        real, imag = lr * factor.real * D, -lr * factor.imag * D
        step = np.block([[unit, zero, zero], [zero, unit, zero], [real, imag, unit]])
        return step @ moments

    return matrix


def extragradient_map(lr: float) -> Blocks:
    """W ← w − lr·D·A(w − lr·D·A·w)."""

    def matrix(A: np.ndarray, D: np.ndarray) -> np.ndarray:
        unit = np.eye(len(A))
        return unit - lr * D @ A @ (unit - lr * D @ A)

    return matrix


def optimistic_map(lr: float, beta: float = 0.0) -> Blocks:
    """M ← m + D(1 − β)(Aw − m), w ← w − lr·D(2m − h), h ← h + D(m − h), on (m, h, w); β = 0: m is the gradient."""

    def matrix(A: np.ndarray, D: np.ndarray) -> np.ndarray:
        unit, zero = np.eye(len(A)), np.zeros_like(A)
        moment = np.block(
            [[unit - (1 - beta) * D, zero, (1 - beta) * D @ A], [zero, unit, zero], [zero, zero, unit]]
        )
        step = np.block([[unit, zero, zero], [zero, unit, zero], [-2 * lr * D, lr * D, unit]])
        keep = np.block([[unit, zero, zero], [D, unit - D, zero], [zero, zero, unit]])
        return keep @ step @ moment

    return matrix


def past_map(lr: float) -> Blocks:
    """Anchor ← anchor − lr·D·A·w, w ← w + D(anchor − lr·A·w − w), on (anchor, w)."""

    def matrix(A: np.ndarray, D: np.ndarray) -> np.ndarray:
        unit = np.eye(len(A))
        return np.block([[unit, -lr * D @ A], [D, unit - D - 2 * lr * D @ A]])

    return matrix


def sizes_of_roots(blocks: Blocks, A: np.ndarray, sizes: tuple[int, ...], alternating: bool) -> np.ndarray:
    """|z|, largest first, of one update of all players."""
    n, start, whole = len(A), 0, None
    if not alternating:
        return np.sort(np.abs(np.linalg.eigvals(blocks(A, np.eye(n)))))[::-1]
    for size in sizes:
        mine = np.zeros((n, n))
        mine[range(start, start + size), range(start, start + size)] = 1
        one = blocks(A, mine)
        whole = one if whole is None else one @ whole
        start += size
    assert whole is not None
    return np.sort(np.abs(np.linalg.eigvals(whole)))[::-1]


def predicted(blocks: Blocks, A: np.ndarray, sizes: tuple[int, ...], alternating: bool) -> float:
    """Spectral radius of one update of all players."""
    return float(sizes_of_roots(blocks, A, sizes, alternating)[0])


EPS = 1e9  # √v̂ + ε is ε up to 1e-9: Adam is then linear, with a rate that can be predicted


def measured(
    make: Callable[[Any], GameOptimizer],
    A: np.ndarray,
    sizes: tuple[int, ...],
    alternating: bool,
    steps: int = 900,
) -> float:
    """Slope of log‖(w, buffers)‖ on the optimizer's own iterates; everything is rescaled so that nothing overflows."""
    generator = torch.Generator().manual_seed(0)
    field = torch.from_numpy(A)
    players = [torch.randn(n, generator=generator, dtype=DOUBLE).requires_grad_() for n in sizes]
    optimizers = [make([p]) for p in players]
    rows = field.split(list(sizes))
    scale, logs = 0.0, []

    def gradients(*which: int) -> None:
        w = torch.cat([p.detach() for p in players])
        for i in which:
            players[i].grad = rows[i] @ w

    for t in range(steps):
        if alternating:
            for i, optimizer in enumerate(optimizers):
                game_step([optimizer], lambda i=i: gradients(i))
        else:
            game_step(optimizers, lambda: gradients(*range(len(players))))
        if t % 9 != 8:
            continue
        tensors = [p.detach() for p in players]
        for optimizer, p in zip(optimizers, players, strict=True):
            tensors += [
                v
                for k, v in optimizer.state[p].items()
                if isinstance(v, torch.Tensor) and k not in ("exp_avg_sq", "step")
            ]
        size = math.sqrt(sum(float((a**2).sum()) for a in tensors))
        scale += math.log(size)
        logs.append(scale)
        for a in tensors:
            a.div_(size)
    tail = np.array(logs[len(logs) // 2 :])
    return float(np.exp(np.polyfit(9 * np.arange(len(tail)), tail, 1)[0]))


GAMES: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {
    "bilinear": (np.array([[0.0, 1.0], [-1.0, 0.0]]), (1, 1)),
    "bilinear, singular values 1 and .4": (
        np.block([[np.zeros((2, 2)), np.diag([1.0, 0.4])], [-np.diag([1.0, 0.4]), np.zeros((2, 2))]]),
        (2, 2),
    ),
    "quadratic, .5 ± i": (np.array([[0.5, 1.0], [-1.0, 0.5]]), (1, 1)),
    "cooperative": (np.array([[1.0, 0.3, 0.1], [0.3, 0.6, 0.2], [0.1, 0.2, 0.8]]), (2, 1)),
    "mixed": (np.array([[1.0, 0.2, 0.7], [0.2, 0.3, -0.5], [-0.7, 0.5, 0.1]]), (1, 2)),
}


CONFIGURATIONS: Mapping[str, tuple[Callable[[Any], GameOptimizer], Blocks]] = {
    **{
        f"ComplexSGD {lr} {momentum} {phase:.2f}": (
            lambda p, lr=lr, m=momentum, q=phase: ComplexSGD(p, lr, m, q),
            complex_map(lr, momentum, phase),
        )
        for lr, momentum, phase in [
            (0.1, 0.0, 0.0),
            (0.1, 0.8, 0.0),
            (0.1, 0.8, math.pi / 8),
            (0.3, 0.7, math.pi / 4),
            (0.1, 0.9, math.pi / 2),
            (0.1, 0.5, math.pi),
        ]
    },
    "ComplexAdam": (
        lambda p: ComplexAdam(p, 0.1 * EPS, (0.8, 0.999), math.pi / 8, eps=EPS),
        complex_map(0.1, 0.8, math.pi / 8),
    ),
    "ComplexAdam, debias": (
        lambda p: ComplexAdam(p, 0.3 * EPS, (0.7, 0.999), 1.0, eps=EPS, debias=True),
        complex_map(0.3, 0.7, 1.0, 1 - cmath.rect(0.7, 1.0)),
    ),
    "Extragradient .1": (lambda p: Extragradient(p, 0.1), extragradient_map(0.1)),
    "Extragradient .5": (lambda p: Extragradient(p, 0.5), extragradient_map(0.5)),
    "ExtrapolationFromThePast": (lambda p: ExtrapolationFromThePast(p, 0.3), past_map(0.3)),
    "OptimisticSGD": (lambda p: OptimisticSGD(p, 0.3), optimistic_map(0.3)),
    "OptimisticAdam": (
        lambda p: OptimisticAdam(p, 0.2 * EPS, (0.5, 0.999), eps=EPS),
        optimistic_map(0.2, 0.5),
    ),
}


@pytest.mark.parametrize("alternating", [False, True], ids=["simultaneous", "alternating"])
@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_measured_rate_is_the_predicted_one(name: str, game: str, alternating: bool) -> None:
    make, blocks = CONFIGURATIONS[name]
    A, sizes = GAMES[game]
    rate, *others = sizes_of_roots(blocks, A, sizes, alternating)
    # a root that is a little smaller takes long to fade
    steps = 2700 if any(0.99 * rate < other < 0.9999 * rate for other in others) else 900
    assert measured(make, A, sizes, alternating, steps) == pytest.approx(rate, abs=1e-3)


def roots_simultaneous(lr: float, beta: complex, eigenvalues: np.ndarray) -> float:
    """Largest |z| with (z − 1)(z² − 2Re β·z + |β|²) + λz(lr·z − lr·Re β) = 0."""
    worst = 0.0
    for eigenvalue in eigenvalues:
        polynomial = np.polymul([1, -1], [1, -2 * beta.real, abs(beta) ** 2])
        polynomial = np.polyadd(polynomial, eigenvalue * lr * np.array([1, -beta.real, 0]))
        worst = max(worst, np.abs(np.roots(polynomial)).max())
    return worst


def roots_alternating(lr: float, beta: complex, singular: float) -> float:
    """Largest |z| with (z − 1)²(z² − 2Re β·z + |β|²)² + lr²s²z³(z − Re β)² = 0."""
    factor = np.polymul([1, -1], [1, -2 * beta.real, abs(beta) ** 2])
    other = np.polymul([1, 0, 0, 0], np.polymul([1, -beta.real], [1, -beta.real]))
    return float(np.abs(np.roots(np.polyadd(np.polymul(factor, factor), (lr * singular) ** 2 * other))).max())


@pytest.mark.parametrize("momentum", [0.0, 0.4, 0.8, 0.9])
@pytest.mark.parametrize("phase", [0.0, math.pi / 8, 1.0, math.pi / 2, math.pi])
@pytest.mark.parametrize("lr", [0.01, 0.1, 0.5])
def test_the_matrices_have_the_published_polynomials(lr: float, momentum: float, phase: float) -> None:
    beta = cmath.rect(momentum, phase)
    for A, sizes in GAMES.values():
        expected = roots_simultaneous(lr, beta, np.linalg.eigvals(A))
        # a double root moves by the square root of the rounding
        assert predicted(complex_map(lr, momentum, phase), A, sizes, False) == pytest.approx(
            expected, abs=1e-6
        )
    A, sizes = GAMES["bilinear"]
    expected = roots_alternating(lr, beta, 1.0)
    assert predicted(complex_map(lr, momentum, phase), A, sizes, True) == pytest.approx(expected, abs=1e-5)


# Convergence rates on xy, computed independently to six digits: (optimizer, alternating, rate).
BETA = math.pi / 8
TABLE: tuple[tuple[str, Callable[[Any], GameOptimizer], bool, float], ...] = (
    ("gradient .1", lambda p: ComplexSGD(p, 0.1, 0.0), False, 1.004988),
    ("gradient .1", lambda p: ComplexSGD(p, 0.1, 0.0), True, 1.000000),
    (".8 at .1", lambda p: ComplexSGD(p, 0.1, 0.8, 0.0), False, 1.149445),
    (".8 e^iπ/8 at .1", lambda p: ComplexSGD(p, 0.1, 0.8, BETA), False, 0.977430),
    (".8 e^iπ/8 at .1", lambda p: ComplexSGD(p, 0.1, 0.8, BETA), True, 0.943940),
    (".9 e^iπ/8 at .1", lambda p: ComplexSGD(p, 0.1, 0.9, BETA), False, 1.052984),
    (".9 e^iπ/8 at .01", lambda p: ComplexSGD(p, 0.01, 0.9, BETA), False, 0.999455),
    (".9i at .1", lambda p: ComplexSGD(p, 0.1, 0.9, math.pi / 2), False, 0.998789),
    (".7i at .8", lambda p: ComplexSGD(p, 0.8, 0.7, math.pi / 2), False, 0.913934),
    (".7i at .8", lambda p: ComplexSGD(p, 0.8, 0.7, math.pi / 2), True, 1.055431),
    ("-.5 at .1", lambda p: ComplexSGD(p, 0.1, 0.5, math.pi), True, 0.998518),
    ("-.5 at .5", lambda p: ComplexSGD(p, 0.5, 0.5, math.pi), True, 0.962544),
    ("extragradient .1", lambda p: Extragradient(p, 0.1), False, math.sqrt(1 - 0.1**2 + 0.1**4)),
    ("extragradient .6", lambda p: Extragradient(p, 0.6), False, math.sqrt(1 - 0.6**2 + 0.6**4)),
    ("optimistic .1", lambda p: OptimisticSGD(p, 0.1), False, math.sqrt((1 + math.sqrt(1 - 4 * 0.1**2)) / 2)),
    ("optimistic .4", lambda p: OptimisticSGD(p, 0.4), False, math.sqrt((1 + math.sqrt(1 - 4 * 0.4**2)) / 2)),
    (
        "from the past .4",
        lambda p: ExtrapolationFromThePast(p, 0.4),
        False,
        math.sqrt((1 + math.sqrt(1 - 4 * 0.4**2)) / 2),
    ),
)


@pytest.mark.parametrize(
    ("name", "make", "alternating", "rate"), TABLE, ids=lambda x: x if isinstance(x, str) else ""
)
def test_rates_on_the_bilinear_game(
    name: str, make: Callable[[Any], GameOptimizer], alternating: bool, rate: float
) -> None:
    A, sizes = GAMES["bilinear"]
    # a double root grows like t·rateᵗ: 1/t of slope
    assert measured(make, A, sizes, alternating, steps=3000) == pytest.approx(rate, abs=2e-5), name


# Smallest rate at a fixed phase: (eigenvalues, phase, rate, (momentum, lr) where they are known to few digits)
BEST = (
    ((1j,), math.pi / 8, 0.935381, (0.8059, 0.09585)),
    ((1j,), math.pi / 4, 0.899454, (0.7071, 0.30028)),
    ((1j,), math.pi / 2, 0.898757, (0.6735, 0.85556)),
    ((0.5 + 1j,), 0.0, 0.894427, (0.0, 0.4)),
    ((0.01, 1.0), 0.0, 9 / 11, (0.66942, 3.3058)),
)


@pytest.mark.parametrize(("eigenvalues", "phase", "rate", "where"), BEST)
def test_the_best_settings(
    eigenvalues: tuple[complex, ...], phase: float, rate: float, where: tuple[float, float]
) -> None:
    """At the minimum of a maximum of roots the rate has a kink, where a change δ moves it by about √δ."""
    rows = [
        np.array([[e.real, e.imag], [-e.imag, e.real]]) if e.imag else np.array([[e.real]])
        for e in map(complex, eigenvalues)
    ]
    n = sum(map(len, rows))
    A, start = np.zeros((n, n)), 0
    for block in rows:
        A[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    momentum, lr = where
    assert measured(lambda p: ComplexSGD(p, lr, momentum, phase), A, (1,) * n, False) == pytest.approx(
        rate, abs=4e-3
    )
