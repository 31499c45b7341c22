"""Eigenvalues by products against LAPACK on the dense Jacobian."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_nested.games import (
    GaussiansGAN,
    JacobianOperator,
    MatchingPennies,
    QuadraticGame,
    game_jacobian,
    game_spectrum,
    leading_eigenvalues,
)
from lightning_nested.linalg.eigenvalues import Which
from tests.linalg.spectra import KEYS, WHICH, closest


@pytest.fixture(scope="module")
def gan() -> tuple[GaussiansGAN, tuple[Tensor, ...]]:
    game = GaussiansGAN(hidden=(6, 6), noise_dim=3, batch_size=32)
    return game, game.initial(torch.Generator().manual_seed(1))


class TestLeading:
    @pytest.mark.parametrize("which", WHICH)
    @pytest.mark.parametrize("k", [1, 4, 7])
    def test_gan_equals_dense(
        self, gan: tuple[GaussiansGAN, tuple[Tensor, ...]], k: int, which: Which
    ) -> None:
        game, players = gan
        truth = np.linalg.eigvals(game_jacobian(game.losses, players).numpy())
        operator = JacobianOperator(game.losses, players).T
        found = leading_eigenvalues(operator, k, which)
        assert len(found.eigenvalues) in (k, k + 1)
        assert found.size == operator.like[0].numel() + operator.like[1].numel()
        wanted = sorted(truth.tolist(), key=KEYS[which])[: len(found.eigenvalues)]
        scale = abs(truth).max()
        assert closest(found.eigenvalues, wanted) < 1e-8 * scale
        assert (
            closest(torch.tensor(wanted, dtype=torch.complex128), found.eigenvalues.tolist()) < 1e-8 * scale
        )
        keys = [KEYS[which](z) for z in found.eigenvalues.tolist()]
        assert keys == pytest.approx(sorted(keys), abs=1e-8 * scale)
        assert found.residuals.max() < 1e-7
        assert found.num_products >= found.size if k is None else found.num_products > 0

    def test_pairs_stay_whole(self) -> None:
        values = torch.arange(1, 61) * 0.1j + torch.linspace(0.1, 2, 60)
        game = QuadraticGame.from_eigenvalues(values)
        operator = JacobianOperator(game.losses, game.initial())
        found = leading_eigenvalues(operator, 3, "largest_imaginary").eigenvalues
        assert found.imag.tolist() == pytest.approx([6.0, -6.0, 5.9, -5.9])

    @pytest.mark.parametrize("scale", [1e-12, 1e-9, 1.0, 1e9])
    def test_the_scale_of_a_game_does_not_matter(self, scale: float) -> None:
        values = (torch.arange(1, 41, dtype=torch.float64) * 0.1j + 0.5) * scale
        game = QuadraticGame.from_eigenvalues(values)
        found = leading_eigenvalues(JacobianOperator(game.losses, game.initial()), 3, "largest_imaginary")
        expected = [0.5 + 4j, 0.5 - 4j, 0.5 + 3.9j, 0.5 - 3.9j]
        assert (found.eigenvalues / scale).tolist() == pytest.approx(expected, abs=1e-8)
        assert float(found.residuals.max()) < 1e-8

    def test_repeats_itself(self, gan: tuple[GaussiansGAN, tuple[Tensor, ...]]) -> None:
        game, players = gan
        first, second = (game_spectrum(game.losses, players, 4) for _ in range(2))
        assert torch.equal(first, second)

    def test_far_fewer_products_than_numbers(self) -> None:
        game = GaussiansGAN(hidden=(32, 32))
        operator = JacobianOperator(game.losses, game.initial(torch.Generator().manual_seed(0)))
        found = leading_eigenvalues(operator.T, 6)
        assert found.size == 2851
        assert found.num_products < 150
        assert found.residuals.max() < 1e-7

    def test_single_precision(self) -> None:
        game = GaussiansGAN(hidden=(6, 6), noise_dim=3, batch_size=32)
        double = game.initial(torch.Generator().manual_seed(1))
        found = game_spectrum(game.losses, tuple(p.detach().float() for p in double), 4)
        truth = game_spectrum(game.losses, double, 4)
        assert found.dtype == torch.complex128
        assert (found - truth).abs().max() < 1e-4 * truth.abs().max()

    def test_reduce_scales_the_spectrum(self, gan: tuple[GaussiansGAN, tuple[Tensor, ...]]) -> None:
        game, players = gan
        whole = game_spectrum(game.losses, players, 4)
        half = game_spectrum(game.losses, players, 4, reduce=lambda flat: flat / 2)
        torch.testing.assert_close(2 * half, whole)


class TestGameSpectrum:
    def test_all_of_a_small_game(self) -> None:
        zero = torch.zeros(1, dtype=torch.float64)
        found = game_spectrum(MatchingPennies().losses, (zero, zero))
        torch.testing.assert_close(found, torch.tensor([0.25j, -0.25j], dtype=torch.complex128))

    def test_known_eigenvalues(self) -> None:
        game = QuadraticGame.mixture(40, 0.8, torch.Generator().manual_seed(0))
        known = game.eigenvalues().tolist()
        for which in WHICH:
            found = game_spectrum(game.losses, game.initial(), 6, which)
            wanted = sorted(known, key=KEYS[which])[: len(found)]
            assert closest(found, wanted) < 1e-9

    @pytest.mark.parametrize("player", [0, 1])
    def test_players_own_block(self, gan: tuple[GaussiansGAN, tuple[Tensor, ...]], player: int) -> None:
        game, players = gan
        n = game.sizes[0]
        part = slice(0, n) if player == 0 else slice(n, None)
        block = game_jacobian(game.losses, players)[part, part]
        truth = np.linalg.eigvalsh(((block + block.T) / 2).numpy())
        largest = game_spectrum(game.losses, players, 3, player=player)
        assert not largest.imag.any()
        expected = truth[np.argsort(-abs(truth))][:3]
        assert largest.real.tolist() == pytest.approx(expected.tolist(), abs=1e-9)
        smallest = game_spectrum(game.losses, players, 2, "smallest_real", player=player)
        assert smallest.real.tolist() == pytest.approx(truth[:2].tolist(), abs=1e-9)
        assert game_spectrum(game.losses, players, player=player).shape == (game.sizes[player],)
        with pytest.raises(ValueError, match="needs an operator that is not symmetric"):
            game_spectrum(game.losses, players, 2, "largest_imaginary", player=player)


class TestErrors:
    def test_arguments(self) -> None:
        game = QuadraticGame.from_eigenvalues([1j] * 3)
        for arguments, message in (
            ({"k": 0}, r"k must lie in \[1, 6\]\. Got 0"),
            ({"k": 7}, r"k must lie in \[1, 6\]\. Got 7"),
            ({"which": "LM"}, "which must be 'largest_magnitude', "),
            ({"tolerance": -1.0}, "tolerance must be non-negative"),
            ({"max_products": 0}, "max_products must be at least 1"),
            ({"player": 2}, r"player must lie in \[0, 2\)"),
        ):
            with pytest.raises(ValueError, match=message):
                game_spectrum(game.losses, game.initial(), **arguments)  # type: ignore[arg-type]

    def test_no_k_leads_round_the_limit_of_dense_matrices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lightning_nested.linalg.eigenvalues.DENSE_LIMIT", 30)
        game = QuadraticGame.from_eigenvalues(torch.arange(1, 21) * 0.1j)
        operator = JacobianOperator(game.losses, game.initial())
        for k in (20, 39, 40):
            with pytest.raises(ValueError, match=rf"at most \(n - 2\)/2 = 19 where n=40 > 30.* Got {k}"):
                leading_eigenvalues(operator, k)
        assert len(leading_eigenvalues(operator, 19, "largest_imaginary").eigenvalues) == 20
