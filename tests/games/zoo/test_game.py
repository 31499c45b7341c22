"""Every game of the zoo: its players, losses and errors."""

from __future__ import annotations

import pytest
import torch

from lightning_nested.games import (
    Bilinear,
    DiracGAN,
    Game,
    GaussiansGAN,
    IteratedPrisonersDilemma,
    MatchingPennies,
    PenniesAndDilemma,
    QuadraticGame,
    RandomSubspace,
    SmallIPD,
)
from tests.games.zoo.games import DOUBLE

ZOO: dict[str, Game] = {
    "quadratic": QuadraticGame.mixture(3, 1.0, torch.Generator().manual_seed(0)),
    "bilinear": Bilinear(torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)),
    "dirac": DiracGAN(0.3),
    "pennies": MatchingPennies(),
    "ipd": IteratedPrisonersDilemma(),
    "small ipd": SmallIPD(),
    "mixed": PenniesAndDilemma(0.25),
    "subspace": RandomSubspace(IteratedPrisonersDilemma(), dim=2),
    "gaussians": GaussiansGAN(hidden=(4,), noise_dim=2, batch_size=8),
}


class TestEveryGame:
    @pytest.mark.parametrize("name", ZOO)
    def test_takes_its_initial_players(self, name: str, generator: torch.Generator) -> None:
        game = ZOO[name]
        for dtype in (torch.float64, torch.float32):
            players = game.initial(generator, dtype=dtype)
            assert tuple(p.numel() for p in players) == game.sizes
            assert all(p.is_leaf and p.requires_grad and p.dtype == dtype for p in players)
            losses = game.losses(players)
            assert len(losses) == len(players) == len(game.names)
            for loss, player in zip(losses, players, strict=True):
                assert loss.shape == ()
                assert loss.dtype == dtype
                (gradient,) = torch.autograd.grad(loss, player, retain_graph=True)
                assert torch.isfinite(gradient).all()
                assert gradient.abs().max() > 0

    @pytest.mark.parametrize("name", ZOO)
    def test_same_generator_same_players(self, name: str) -> None:
        first, second = (ZOO[name].initial(torch.Generator().manual_seed(7)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("name", ZOO)
    def test_refuses_players_that_do_not_fit(self, name: str) -> None:
        game = ZOO[name]
        players = game.initial()
        for wrong in (players[:1], (players[0], players[1][None]), (*players, players[0])):
            with pytest.raises(ValueError, match=r"must be tensors of shapes .* Got .*initial"):
                game.losses(wrong)
