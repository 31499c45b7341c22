"""Quadratic and bilinear games: Jacobians and spectra against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nested.games import (
    Bilinear,
    QuadraticGame,
)
from tests.conftest import Normal
from tests.games.zoo.games import by_imaginary, jacobian


class TestQuadratic:
    def test_jacobian_is_the_second_derivative(self, normal: Normal) -> None:
        a, b, c = normal(3, 3), normal(3, 2), normal(2, 2)
        game = QuadraticGame(a + a.mT, b, c + c.mT)
        torch.testing.assert_close(
            game.jacobian(), jacobian(game, normal(3), normal(2)), rtol=1e-13, atol=1e-13
        )
        assert by_imaginary(game.eigenvalues()) == pytest.approx(
            by_imaginary(torch.linalg.eigvals(game.jacobian())), abs=1e-12
        )

    def test_eigenvalues_of_diagonals_in_closed_form(self, normal: Normal) -> None:
        game = QuadraticGame(normal(6), normal(6), normal(6))
        dense = torch.linalg.eigvals(game.jacobian())
        assert by_imaginary(game.eigenvalues()) == pytest.approx(by_imaginary(dense), abs=1e-12)

    def test_from_eigenvalues(self) -> None:
        game = QuadraticGame.from_eigenvalues([0.5 + 1j, 0.25])
        assert by_imaginary(game.eigenvalues()) == pytest.approx([0.5 - 1j, 0.25, 0.25, 0.5 + 1j])

    def test_mixture_goes_from_cooperative_to_adversarial(self, generator: torch.Generator) -> None:
        cooperative = QuadraticGame.mixture(50, 0.0, generator).eigenvalues()
        assert cooperative.imag.abs().max() == 0
        mixed = QuadraticGame.mixture(50, 1.0, generator).eigenvalues()
        angle = mixed.angle().abs()
        assert angle.min() < 0.2
        assert angle.max() > 1.2
        assert mixed.real.min() > 0

    @pytest.mark.parametrize(("rows", "columns"), [(2, 3), (3, 2), (2, 2)])
    def test_bilinear(self, rows: int, columns: int, normal: Normal) -> None:
        matrix = normal(rows, columns)
        game = Bilinear(matrix)
        x, y = normal(rows), normal(columns)
        first, second = game.losses((x, y))
        assert float(first) == pytest.approx(float(x @ matrix @ y))
        assert float(second) == -float(first)
        assert by_imaginary(game.eigenvalues()) == pytest.approx(
            by_imaginary(torch.linalg.eigvals(jacobian(game, x, y))), abs=1e-12
        )

    def test_bilinear_takes_a_vector_and_a_number(self) -> None:
        assert Bilinear(torch.tensor(2.0)).sizes == (1, 1)
        assert Bilinear(torch.tensor([2.0, 1.0])).sizes == (1, 2)
        assert by_imaginary(Bilinear().eigenvalues()) == [-1j, 1j]

    def test_refuses(self) -> None:
        one, matrix = torch.ones(2), torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        with pytest.raises(ValueError, match=r"shapes \(2, 2\) and \(2, 2\)\. Got \(3, 3\)"):
            QuadraticGame(torch.ones(3), one, one)
        with pytest.raises(ValueError, match=r"first must be symmetric\. Got an asymmetry of 2"):
            QuadraticGame(matrix, one, one)
        for adversarial in (-0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match=r"adversarial must lie in \[0, 1\]"):
                QuadraticGame.mixture(2, adversarial)
        with pytest.raises(ValueError, match="size must be at least 1"):
            QuadraticGame.mixture(0, 0.5)
