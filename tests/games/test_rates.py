"""Predicted rates against reference values, polynomial roots, matrices, and iterates that were run."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_nested.games import (
    Bilinear,
    QuadraticGame,
    convergence_rate,
    eigenvalue_rates,
    extragradient_rate,
    joint_gradient,
    momentum_map,
    optimistic_rate,
    proximal_rate,
)
from tests.conftest import Normal

PI = math.pi
EIGHTH = PI / 8

# Settings on the bilinear game xy, and the rate to six digits: lr, |β|, phase, alternating.
TABLE = [
    (0.1, 0.0, 0.0, False, 1.004988),
    (0.1, 0.0, 0.0, True, 1.000000),
    (0.1, 0.8, 0.0, False, 1.149445),
    (0.1, 0.8, EIGHTH, False, 0.977430),
    (0.1, 0.8, EIGHTH, True, 0.943940),
    (0.1, 0.9, EIGHTH, False, 1.052984),
    (0.01, 0.9, EIGHTH, False, 0.999455),
    (0.1, 0.9, PI / 2, False, 0.998789),
    (0.8, 0.7, PI / 2, False, 0.913934),
    (0.8, 0.7, PI / 2, True, 1.055431),
    (0.1, 0.5, PI, True, 0.998518),
    (0.5, 0.5, PI, True, 0.962544),
]


def roots_radius(value: complex, lr: float, momentum: float, phase: float, alternating: bool) -> float:
    """The polynomials as they are written in the paper, by numpy.roots."""
    c, m = momentum * math.cos(phase), momentum**2
    drift, pull = np.polymul([1, -1], [1, -2 * c, m]), np.array([1, -c])
    if not alternating or value.imag == 0:
        polynomial = np.polyadd(drift, lr * value * np.polymul([1, 0], pull))
    else:
        own = np.polyadd(drift, lr * value.real * np.polymul([1, 0], pull))
        coupled = (lr * value.imag) ** 2 * np.polymul([1, 0, 0, 0], np.polymul(pull, pull))
        polynomial = np.polyadd(np.polymul(own, own), coupled)
    return float(abs(np.roots(polynomial)).max())


class TestReferenceTable:
    @pytest.mark.parametrize(("lr", "momentum", "phase", "alternating", "rate"), TABLE)
    def test_momentum(self, lr: float, momentum: float, phase: float, alternating: bool, rate: float) -> None:
        found = convergence_rate([1j, -1j], lr=lr, momentum=momentum, phase=phase, alternating=alternating)
        assert found == pytest.approx(rate, abs=5.1e-7)
        matrix = momentum_map(
            Bilinear().jacobian(),
            lr=lr,
            momentum=momentum,
            phase=phase,
            sizes=(1, 1) if alternating else None,
        )
        # Gradient steps alone have double eigenvalues, which are found to the root of the precision.
        assert float(torch.linalg.eigvals(matrix).abs().max()) == pytest.approx(found, abs=1e-7)

    @pytest.mark.parametrize("lr", [0.05, 0.1, 0.3, 0.5])
    def test_other_methods(self, lr: float) -> None:
        assert extragradient_rate([1j, -1j], lr=lr) == pytest.approx(math.sqrt(1 - lr**2 + lr**4), rel=1e-14)
        assert optimistic_rate([1j, -1j], lr=lr) == pytest.approx(
            math.sqrt((1 + math.sqrt(1 - 4 * lr**2)) / 2), rel=1e-14
        )
        assert proximal_rate([1j, -1j], lr=lr) == pytest.approx(1 / math.sqrt(1 + lr**2), rel=1e-14)

    @pytest.mark.parametrize("beta", [0.2 + 0.3j, 0.5j, 0.62j, 0.7 + 0.2j, -0.3 + 0.1j, 0.55j, -0.5, 0.4])
    def test_small_steps_converge_where_the_criterion_says(self, beta: complex) -> None:
        c, d = beta.real, 1 - 2 * beta.real + abs(beta) ** 2
        settings = {"lr": 1e-3, "momentum": abs(beta), "phase": math.atan2(beta.imag, beta.real)}
        simultaneous = convergence_rate([1j], **settings) < 1
        assert simultaneous == ((3 - c) * d > 4 * (1 - c) ** 2)
        alternating = convergence_rate([1j], alternating=True, **settings) < 1
        assert alternating == ((2 - c) * d > 2 * (1 - c) ** 2)


class TestConvergenceRate:
    def test_equals_the_roots(self) -> None:
        random = np.random.default_rng(0)
        for _ in range(300):
            value = complex(random.uniform(-1, 2), random.choice([0.0, random.uniform(-2, 2)]))
            settings = {
                "lr": random.uniform(0.01, 2),
                "momentum": random.random(),
                "phase": random.uniform(-PI, PI),
            }
            for alternating in (False, True):
                expected = roots_radius(value, **settings, alternating=alternating)
                found = convergence_rate([value], **settings, alternating=alternating)
                # A double root is found to the root of the precision.
                assert found == pytest.approx(expected, rel=1e-7)

    def test_every_kind_of_multiple_root(self) -> None:
        # No momentum: 0, 0 and 1 − αλ; heavy ball at its optimum: a double root at √β; λ = 0: 1.
        assert convergence_rate([0.5], lr=1.0, momentum=0.0) == pytest.approx(0.5, rel=1e-15)
        root = math.sqrt(9.0)
        best = {"lr": 4 / (root + 1) ** 2, "momentum": ((root - 1) / (root + 1)) ** 2}
        assert convergence_rate([1.0, 9.0], **best) == pytest.approx(0.5, abs=1e-7)
        assert convergence_rate([0.0], lr=1.0, momentum=0.5, phase=1.0) == pytest.approx(1.0, rel=1e-12)

    def test_conjugates_do_not_matter(self, normal: Normal) -> None:
        values = torch.complex(normal(5).abs(), normal(5))
        for alternating in (False, True):
            rates = {
                round(
                    convergence_rate(v, lr=0.2, momentum=0.6, phase=sign * 0.7, alternating=alternating), 12
                )
                for v in (values, values.conj())
                for sign in (1, -1)
            }
            assert len(rates) == 1

    @pytest.mark.parametrize("alternating", [False, True])
    def test_grids_and_eigenvalues_broadcast(self, alternating: bool) -> None:
        values = [0.3, 0.2 + 1j, -0.5j]
        lr, momentum = torch.tensor([0.1, 0.5]), torch.tensor([[0.0], [0.4], [0.8]])
        grid = convergence_rate(values, lr=lr, momentum=momentum, phase=0.3, alternating=alternating)
        assert isinstance(grid, Tensor)
        assert grid.shape == (3, 2)
        assert grid.dtype == torch.float64
        for i, m in enumerate((0.0, 0.4, 0.8)):
            for j, a in enumerate((0.1, 0.5)):
                a, m = float(lr[j]), float(momentum[i, 0])
                each = [
                    convergence_rate([v], lr=a, momentum=m, phase=0.3, alternating=alternating)
                    for v in values
                ]
                assert float(grid[i, j]) == max(each)
        each = eigenvalue_rates(
            torch.tensor(values).reshape(3, 1), lr=0.1, momentum=0.4, phase=0.3, alternating=alternating
        )
        assert each.shape == (3, 1)
        alone = [
            convergence_rate([v], lr=0.1, momentum=0.4, phase=0.3, alternating=alternating)
            for v in torch.tensor(values).tolist()
        ]
        assert each.reshape(-1).tolist() == alone

    def test_other_methods_take_grids(self) -> None:
        lr = torch.tensor([0.1, 0.2], dtype=torch.float64)
        for rate in (extragradient_rate, optimistic_rate, proximal_rate):
            grid = rate([0.5, 1j], lr=lr)
            assert isinstance(grid, Tensor)
            assert grid.tolist() == [rate([0.5, 1j], lr=0.1), rate([0.5, 1j], lr=0.2)]

    def test_refuses(self) -> None:
        good = {"lr": 0.1, "momentum": 0.5, "phase": 0.0}
        for change, message in (
            ({"lr": 0.0}, r"lr must be positive\. Got 0"),
            ({"lr": math.inf}, "lr must be a finite number or a Tensor. Got inf"),
            ({"momentum": 1.0}, r"momentum \|β\| must lie in \[0, 1\)\. Got 1"),
            ({"momentum": torch.tensor([0.5, -0.1])}, r"Got -0\.1"),
            ({"phase": 4.0}, r"phase must lie in \[-π, π\]\. Got 4"),
        ):
            with pytest.raises(ValueError, match=message):
                convergence_rate([1j], **{**good, **change})  # type: ignore[call-overload]
        with pytest.raises(ValueError, match=r"at least one eigenvalue\. Got none"):
            convergence_rate([], lr=0.1, momentum=0.5)
        with pytest.raises(ValueError, match=r"eigenvalues must be .* finite complex numbers"):
            convergence_rate([complex(math.nan, 0)], lr=0.1, momentum=0.5)


class TestMap:
    @pytest.mark.parametrize("sizes", [None, (2, 2), (1, 3), (1, 1, 2)])
    def test_is_what_the_updates_do(self, sizes: tuple[int, ...] | None, normal: Normal) -> None:
        jacobian, beta, lr = normal(4, 4), 0.6 * np.exp(0.5j), 0.3
        w, mu = normal(4), torch.complex(normal(4), normal(4))
        state = torch.cat([mu.real, mu.imag, w])
        step = momentum_map(jacobian, lr=lr, momentum=0.6, phase=0.5, sizes=sizes)
        for _ in range(3):
            at = 0
            for size in sizes or (4,):
                own = slice(at, at + size)
                mu[own] = complex(beta) * mu[own] - (jacobian @ w)[own]
                w = w.clone()
                w[own] += lr * mu[own].real
                at += size
            state = step @ state
        torch.testing.assert_close(state, torch.cat([mu.real, mu.imag, w]), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("steps", [None, (2, 1, 3)])
    def test_players_with_settings_of_their_own(self, steps: tuple[int, ...] | None, normal: Normal) -> None:
        jacobian, sizes = normal(4, 4), (1, 1, 2)
        lr, size, phase = (torch.tensor(x, dtype=torch.float64) for x in ([0.3, 0.1, 0.2, 0.4],) * 3)
        beta = torch.polar(size, phase)
        w, mu = normal(4), torch.complex(normal(4), normal(4))
        state = torch.cat([mu.real, mu.imag, w])
        at = 0
        for size_of, times in zip(sizes, steps or (1, 1, 1), strict=True):
            own = slice(at, at + size_of)
            for _ in range(times):
                mu[own] = beta[own] * mu[own] - (jacobian @ w)[own]
                w = w.clone()
                w[own] += lr[own] * mu[own].real
            at += size_of
        step = momentum_map(jacobian, lr=lr, momentum=size, phase=phase, sizes=sizes, steps=steps)
        torch.testing.assert_close(step @ state, torch.cat([mu.real, mu.imag, w]), rtol=1e-12, atol=1e-12)

    def test_rates_of_mixtures_are_exact(self) -> None:
        game = QuadraticGame.from_eigenvalues([0.3 + 1j, 0.1 + 0.2j, 0.7])
        settings = {"lr": 0.3, "momentum": 0.5, "phase": 0.9}
        for sizes in (None, game.sizes):
            radius = torch.linalg.eigvals(momentum_map(game.jacobian(), sizes=sizes, **settings)).abs().max()
            rate = convergence_rate(game.eigenvalues(), alternating=sizes is not None, **settings)
            assert rate == pytest.approx(float(radius), rel=1e-7)

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="square matrix"):
            momentum_map(torch.ones(2, 3), lr=0.1, momentum=0.0)
        with pytest.raises(ValueError, match=r"sizes must be positive and sum to 2\. Got \(1, 2\)"):
            momentum_map(torch.eye(2), lr=0.1, momentum=0.0, sizes=(1, 2))
        with pytest.raises(
            ValueError, match=r"steps must be positive, one for each of 2 players\. Got \(0, 1\)"
        ):
            momentum_map(torch.eye(2), lr=0.1, momentum=0.0, sizes=(1, 1), steps=(0, 1))
        with pytest.raises(ValueError, match="steps needs sizes"):
            momentum_map(torch.eye(2), lr=0.1, momentum=0.0, steps=(1, 1))
        with pytest.raises(ValueError, match=r"or of shape \(2,\)\. Got shape \(3,\)"):
            momentum_map(torch.eye(2), lr=0.1, momentum=torch.zeros(3))


class TestMeasured:
    """Run the methods on games through autograd; the distance shrinks at the predicted rate within 1e-3."""

    GAME = QuadraticGame.from_eigenvalues([0.2 + 1j, 0.4 + 0.3j, 0.8])

    @staticmethod
    def measured(step, players: tuple[Tensor, ...], steps: int = 300) -> float:  # type: ignore[no-untyped-def]
        sizes = []
        for _ in range(steps):
            players = step(players)
            sizes.append(float(torch.cat(players).norm()))
        half = steps // 2
        return float((sizes[-1] / sizes[half]) ** (1 / (steps - 1 - half)))

    @pytest.mark.parametrize("alternating", [False, True])
    @pytest.mark.parametrize("phase", [0.0, EIGHTH, PI / 2, PI])
    def test_momentum(self, phase: float, alternating: bool) -> None:
        lr, momentum = 0.3, 0.5
        beta = complex(momentum * np.exp(1j * phase))
        memory = [torch.zeros(3, dtype=torch.complex128) for _ in range(2)]

        def step(players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            gradient = joint_gradient(self.GAME.losses, players)
            moved = list(players)
            for i in range(2):
                if alternating and i:
                    gradient = joint_gradient(self.GAME.losses, tuple(moved))
                memory[i] = beta * memory[i] - gradient[i]
                moved[i] = players[i] + lr * memory[i].real
            return tuple(moved)

        rate = convergence_rate(
            self.GAME.eigenvalues(), lr=lr, momentum=momentum, phase=phase, alternating=alternating
        )
        start = tuple(p.detach() for p in self.GAME.initial(torch.Generator().manual_seed(0)))
        # A pair of roots turns: over half the run that is worth a constant to the power 1/150.
        assert self.measured(step, start) == pytest.approx(rate, abs=5e-3)

    def test_extragradient_and_optimistic(self) -> None:
        lr = 0.4
        start = tuple(p.detach() for p in self.GAME.initial(torch.Generator().manual_seed(0)))

        def moved(players: tuple[Tensor, ...], gradient: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(p - lr * g for p, g in zip(players, gradient, strict=True))

        def extragradient(players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            ahead = moved(players, joint_gradient(self.GAME.losses, players))
            return moved(players, joint_gradient(self.GAME.losses, ahead))

        last = [tuple(torch.zeros_like(p) for p in start)]

        def optimistic(players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            gradient = joint_gradient(self.GAME.losses, players)
            direction = tuple(2 * g - old for g, old in zip(gradient, last[0], strict=True))
            last[0] = gradient
            return moved(players, direction)

        for step, rate in ((extragradient, extragradient_rate), (optimistic, optimistic_rate)):
            predicted = rate(self.GAME.eigenvalues(), lr=lr)
            assert self.measured(step, start) == pytest.approx(predicted, abs=1e-3)


def test_pi_rounded_up_is_pi() -> None:
    at = {
        phase: convergence_rate([1j], lr=0.5, momentum=0.5, phase=phase, alternating=True)
        for phase in (math.pi, 3.1416, -3.142)
    }
    assert len(set(at.values())) == 1
    jacobian = torch.eye(2, dtype=torch.float64)
    steps = [momentum_map(jacobian, lr=0.1, momentum=0.5, phase=p) for p in (math.pi, 3.1416)]
    assert torch.equal(*steps)
    with pytest.raises(ValueError, match="phase must lie"):
        convergence_rate([1j], lr=0.5, momentum=0.5, phase=3.15)
