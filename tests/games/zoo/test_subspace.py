"""Random subspaces of a game."""

from __future__ import annotations

import pytest
import torch

from lightning_nested.games import (
    IteratedPrisonersDilemma,
    RandomSubspace,
)
from tests.conftest import Normal


class TestRandomSubspace:
    def test_is_a_cut_through_the_game(self, normal: Normal) -> None:
        game = IteratedPrisonersDilemma()
        cut = RandomSubspace(game, dim=2, generator=torch.Generator().manual_seed(3))
        players = (normal(2), normal(2))
        whole = tuple(p @ z + b for p, z, b in zip(cut.projections, players, cut.offsets, strict=True))
        assert cut.losses(players) == game.losses(whole)
        again = RandomSubspace(game, dim=2, generator=torch.Generator().manual_seed(3))
        assert again.losses(players) == cut.losses(players)

    def test_refuses(self) -> None:
        for dim in (0, 6):
            with pytest.raises(ValueError, match=rf"dim must lie between 1 and .* 5\. Got {dim}"):
                RandomSubspace(IteratedPrisonersDilemma(), dim=dim)
        with pytest.raises(ValueError, match="spread must be non-negative"):
            RandomSubspace(IteratedPrisonersDilemma(), spread=-1)
