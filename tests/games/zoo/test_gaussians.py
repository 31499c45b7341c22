"""GAN on a ring of Gaussians, against networks of torch."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_nested.games import (
    GaussiansGAN,
    high_quality,
    modes_covered,
)
from tests.games.zoo.games import DOUBLE


class TestGaussians:
    def test_network_is_the_usual_one(self, generator: torch.Generator) -> None:
        game = GaussiansGAN(hidden=(5, 4), noise_dim=3, batch_size=6)
        players = tuple(p.detach() for p in game.initial(generator))

        def module(flat: Tensor, widths: tuple[int, ...]) -> torch.nn.Sequential:
            layers: list[torch.nn.Module] = []
            for i, o in pairwise(widths):
                layers += [torch.nn.Linear(i, o, dtype=DOUBLE), torch.nn.Tanh()]
            net = torch.nn.Sequential(*layers[:-1])
            torch.nn.utils.vector_to_parameters(flat, net.parameters())
            return net.requires_grad_(False)

        discriminator, maker = module(players[0], (2, 5, 4, 1)), module(players[1], (3, 5, 4, 2))
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        fake, real = discriminator(maker(game.noise)), discriminator(game.real)
        ones = torch.ones_like(fake)
        first, second = game.losses(players)
        assert float(first) == pytest.approx(float(entropy(real, ones) + entropy(fake, 0 * ones)))
        assert float(second) == pytest.approx(float(entropy(fake, ones)))
        game.saturating = True
        assert float(game.losses(players)[1]) == pytest.approx(-float(entropy(fake, 0 * ones)))

    def test_a_batch_stays_until_it_is_drawn_again(self, generator: torch.Generator) -> None:
        game = GaussiansGAN(hidden=(4,), noise_dim=2, batch_size=8)
        players = game.initial(generator)
        before = game.losses(players)
        assert game.losses(players) == before
        game.resample(generator)
        assert game.losses(players)[0] != before[0]

    def test_data_cover_every_mode(self, generator: torch.Generator) -> None:
        game = GaussiansGAN()
        data = game.data(4000, generator)
        assert modes_covered(data, game.centres, game.std) == 8
        # Within three standard deviations in the plane: 1 − e^{−9/2}; 4000 draws have a deviation of 0.0017.
        assert float(high_quality(data, game.centres, game.std)) == pytest.approx(
            1 - math.exp(-4.5), abs=5 * 0.0017
        )

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="must be at least 1"):
            GaussiansGAN(batch_size=0)
        for wrong in ({"std": 0.0}, {"radius": -1.0}):
            with pytest.raises(ValueError, match="must be positive"):
                GaussiansGAN(**wrong)
        with pytest.raises(ValueError, match="num_modes"):
            GaussiansGAN(num_modes=0)
