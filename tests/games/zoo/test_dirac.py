"""Dirac-GAN: eigenvalues and losses in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nested.games import (
    DiracGAN,
)
from tests.games.zoo.games import DOUBLE, by_imaginary, jacobian


class TestDiracGAN:
    @pytest.mark.parametrize("penalty", [0.0, 0.3, 1.0, 2.0])
    def test_eigenvalues_at_the_solution(self, penalty: float) -> None:
        game, zero = DiracGAN(penalty), torch.zeros(1, dtype=DOUBLE)
        found = jacobian(game, zero, zero)
        torch.testing.assert_close(found, torch.tensor([[penalty, 0.5], [-0.5, 0.0]], dtype=DOUBLE))
        # At penalty 1 the eigenvalue is double, so its rounding error is a square root.
        expected = by_imaginary(torch.linalg.eigvals(found))
        assert by_imaginary(game.eigenvalues()) == pytest.approx(expected, abs=1e-7)
        if penalty == 0:
            assert by_imaginary(game.eigenvalues()) == [-0.5j, 0.5j]

    def test_losses(self) -> None:
        psi, theta = (torch.tensor([v], dtype=DOUBLE) for v in (1.5, -0.7))
        discriminator, generator = DiracGAN(2.0).losses((psi, theta))
        fooled = -math.log(1 + math.exp(1.5 * -0.7))
        assert float(generator) == pytest.approx(fooled)
        assert float(discriminator) == pytest.approx(math.log(2) - fooled + 1.5**2)

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"penalty must be non-negative\. Got -1"):
            DiracGAN(-1)
