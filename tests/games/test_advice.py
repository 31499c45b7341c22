"""Suggested momentum against the reference table, against grids, and in games that were played."""

import math
import time

import numpy as np
import pytest
import torch

from lightning_nested.games import (
    Bilinear,
    QuadraticGame,
    convergence_rate,
    game_spectrum,
    momentum_map,
    suggest_momentum,
)

PI = math.pi
IMAGINARY, THREE, MIXED = [1j, -1j], [1.0, 1j, -1j], [0.5 + 1j, 0.5 - 1j]
COOPERATIVE = torch.linspace(0.01, 1, 60, dtype=torch.float64)

# Best simultaneous rate for a fixed phase, minimised to 1e-6: spectrum, phase, rate.
TABLE = [
    (IMAGINARY, PI / 8, 0.935381),
    (IMAGINARY, PI / 4, 0.899454),
    (IMAGINARY, PI / 2, 0.898757),
    (THREE, PI / 8, 0.935381),
    (THREE, PI / 4, 0.899454),
    (THREE, PI / 2, 0.898757),
    (MIXED, 0.0, 0.894427),
    (MIXED, PI / 8, 0.855269),
    (MIXED, PI / 4, 0.759044),
    (MIXED, PI / 2, 0.655794),
    (MIXED, PI, 0.618034),
    (COOPERATIVE, 0.0, 9 / 11),
    (COOPERATIVE, PI / 8, 0.940871),
    (COOPERATIVE, PI / 2, 0.980198),
]
ROUNDING = 1.5e-6  # the table has six digits, and was minimised to 1e-6


class TestReferenceTable:
    @pytest.mark.parametrize(("spectrum", "phase", "rate"), TABLE)
    def test_at_least_as_good_at_the_phase(self, spectrum, phase: float, rate: float) -> None:  # type: ignore[no-untyped-def]
        found = suggest_momentum(spectrum, phase=phase)
        assert found.rate <= rate + ROUNDING
        assert found.rate >= rate - 1e-4  # not by an error of the rate
        assert found.phase == phase
        again = convergence_rate(spectrum, lr=found.lr, momentum=found.momentum, phase=phase)
        assert again == pytest.approx(found.rate, rel=1e-9)

    @pytest.mark.parametrize("spectrum", [IMAGINARY, THREE, MIXED, COOPERATIVE])
    def test_free_phase_is_never_worse(self, spectrum) -> None:  # type: ignore[no-untyped-def]
        free = suggest_momentum(spectrum)
        assert free.rate <= min(r for s, _, r in TABLE if s is spectrum) + ROUNDING
        for phase in (0.2, 0.9, 1.18, 2.0, 2.8):
            try:
                fixed = suggest_momentum(spectrum, phase=phase).rate
            except ValueError:
                continue  # nothing converges at this phase
            assert free.rate <= fixed + ROUNDING

    @pytest.mark.parametrize("phase", [0.0, PI])
    @pytest.mark.parametrize("spectrum", [IMAGINARY, THREE])
    def test_real_momentum_cannot(self, spectrum: list[complex], phase: float) -> None:
        with pytest.raises(ValueError, match=r"must contract every eigenvalue\. Got none that do at phase="):
            suggest_momentum(spectrum, phase=phase)

    def test_cooperation_gives_heavy_ball(self) -> None:
        found = suggest_momentum(COOPERATIVE)
        assert found.rate == pytest.approx(9 / 11, abs=1e-6)
        assert (found.lr, found.momentum, found.phase) == pytest.approx((400 / 121, 81 / 121, 0), abs=1e-4)


class TestSearch:
    @pytest.mark.parametrize("alternating", [False, True])
    @pytest.mark.parametrize("seed", range(3))
    def test_no_grid_point_is_better(self, seed: int, alternating: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        values = QuadraticGame.mixture(6, 0.9, generator).eigenvalues()
        found = suggest_momentum(values, alternating=alternating)
        axes = (np.geomspace(0.02, 6, 24), np.linspace(0, 0.98, 15), np.linspace(0, PI, 13))
        lr, momentum, phase = (torch.from_numpy(g) for g in np.meshgrid(*axes, indexing="ij"))
        grid = convergence_rate(
            values, lr=lr / float(values.abs().max()), momentum=momentum, phase=phase, alternating=alternating
        )
        assert found.rate <= float(grid.min())

    def test_scale_of_the_game_is_a_scale_of_the_rate(self) -> None:
        small, large = (suggest_momentum([c * 1j, c * (0.3 + 0.5j)]) for c in (1e-3, 1e3))
        assert small.rate == pytest.approx(large.rate, abs=1e-6)
        assert small.lr == pytest.approx(1e6 * large.lr, rel=1e-3)

    def test_predicted_is_the_rate_of_the_game(self) -> None:
        game = QuadraticGame.mixture(5, 0.8, torch.Generator().manual_seed(0))
        values = game_spectrum(game.losses, game.initial())
        for alternating, sizes in ((False, None), (True, game.sizes)):
            found = suggest_momentum(values, alternating=alternating)
            step = momentum_map(game.jacobian(), sizes=sizes, **found.settings)
            assert float(torch.linalg.eigvals(step).abs().max()) == pytest.approx(found.rate, abs=1e-6)

    def test_either_order(self) -> None:
        either = suggest_momentum(IMAGINARY, alternating=None)
        assert either.alternating
        assert either.rate == suggest_momentum(IMAGINARY, alternating=True).rate < 0.35

    def test_a_phase_keeps_its_sign(self) -> None:
        assert suggest_momentum(IMAGINARY, phase=-PI / 8).phase == -PI / 8

    def test_repeats_itself(self) -> None:
        assert suggest_momentum(MIXED) == suggest_momentum(MIXED)

    def test_leaves_the_global_streams_alone(self) -> None:
        before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
        suggest_momentum(IMAGINARY, phase=PI / 8)
        assert (np.random.get_state()[1] == before).all()  # type: ignore[index]

    def test_is_quick(self) -> None:
        values = QuadraticGame.mixture(50, 0.9, torch.Generator().manual_seed(0)).eigenvalues()
        suggest_momentum(IMAGINARY)  # imports
        seconds = []
        for _ in range(3):
            began = time.process_time()
            suggest_momentum(values)
            seconds.append(time.process_time() - began)
        assert min(seconds) < 1.0

    def test_zeros_do_not_count(self) -> None:
        with_zeros = suggest_momentum([0.0, 1e-12, *MIXED], phase=PI / 2)
        assert with_zeros.rate == pytest.approx(suggest_momentum(MIXED, phase=PI / 2).rate, abs=1e-9)


class TestNoise:
    @pytest.mark.parametrize("alternating", [False, True])
    def test_holds_for_every_perturbation(self, alternating: bool) -> None:
        values = torch.tensor([1j, 0.3 + 0.5j, 0.2], dtype=torch.complex128)
        found = suggest_momentum(values, noise=0.1, alternating=alternating)
        plain = suggest_momentum(values, alternating=alternating)
        assert plain.rate < found.rate < 1
        generator = torch.Generator().manual_seed(0)
        worst = {"robust": 0.0, "plain": 0.0}
        for _ in range(200):
            radius, angle = torch.rand(2, 3, generator=generator, dtype=torch.float64)
            moved = values * (1 + torch.polar(0.1 * radius.sqrt(), 2 * PI * angle))
            moved = torch.complex(moved.real.clamp_min(0), moved.imag)
            for name, advice in (("robust", found), ("plain", plain)):
                rate = convergence_rate(moved, alternating=alternating, **advice.settings)
                worst[name] = max(worst[name], rate)
        # The circle is sampled: between two points it may be a little worse.
        assert worst["robust"] <= found.rate + 0.02 * (1 - found.rate)
        assert worst["plain"] > worst["robust"]

    def test_measured_eigenvalues_a_little_to_the_left(self) -> None:
        found = suggest_momentum([-0.01 + 1j], noise=0.1, phase=PI / 4)
        assert convergence_rate([1j], **found.settings) < 1


class TestUnstable:
    def test_negative_eigenvalues(self) -> None:
        values = [1j, -0.2, 0.5]
        with pytest.raises(ValueError, match=r"must not be negative\. Got: 1 of 3 .* as far as -0\.2"):
            suggest_momentum(values)
        with pytest.warns(UserWarning, match="They are left out"):
            found = suggest_momentum(values, unstable="drop", phase=PI / 4)
        assert found.dropped == 1
        assert found.rate == pytest.approx(suggest_momentum([1j, 0.5], phase=PI / 4).rate)
        with pytest.raises(ValueError, match="must not be negative"):
            suggest_momentum([-1.0], unstable="drop")

    def test_turning_away(self) -> None:
        with pytest.warns(UserWarning, match="1 eigenvalues have a negative real part, as low as -0.01"):
            found = suggest_momentum([-0.01 + 1j])
        assert found.rate < 0.95

    def test_rounding_is_not_instability(self) -> None:
        game = Bilinear(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        values = torch.linalg.eigvals(game.jacobian())
        assert values.real.min() < 0
        assert suggest_momentum(values, phase=PI / 4).rate < 1


class TestArguments:
    def test_refuses(self) -> None:
        for arguments, message in (
            ({"phase": 4.0}, r"phase must lie in \[-π, π\], or be None\. Got 4"),
            ({"noise": 1.0}, r"noise must lie in \[0, 1\)"),
            ({"cutoff": -0.1}, r"cutoff must lie in \[0, 1\)"),
            ({"unstable": "ignore"}, "unstable must be 'raise' or 'drop'"),
        ):
            with pytest.raises(ValueError, match=message):
                suggest_momentum(IMAGINARY, **arguments)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="Got only zeros"):
            suggest_momentum([0.0, 0.0])
        with pytest.raises(ValueError, match="at least one eigenvalue"):
            suggest_momentum([])

    def test_result_is_what_an_optimizer_takes(self) -> None:
        found = suggest_momentum(IMAGINARY, phase=PI / 8)
        assert found.settings == {"lr": found.lr, "momentum": found.momentum, "phase": found.phase}
        with pytest.raises(AttributeError):
            found.lr = 1.0  # type: ignore[misc]

    def test_pi_rounded_up_is_pi(self) -> None:
        assert suggest_momentum([1.0], phase=3.1416).phase == PI
        assert suggest_momentum([1.0], phase=-3.142).phase == -PI
