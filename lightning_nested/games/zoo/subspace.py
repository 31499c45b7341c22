"""Random subspace of a game: its players seen through random projections."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nested.arguments import checked
from lightning_nested.games.zoo.game import Game


@checked
class RandomSubspace(Game):
    """The game in which player i holds zᵢ of shape (d,) and plays θᵢ = Pᵢ zᵢ + bᵢ in the given one.

    A two-dimensional cut through a game of many dimensions, still with one player per axis.

    Args:
        game: Whole game.
        dim: d, numbers each player holds.
        generator: Draws Pᵢ and bᵢ, standard normal; None: a fixed seed.
        spread: Standard deviation of the offsets bᵢ; 0: the subspace holds the origin.

    Raises:
        ValueError: ``dim`` below 1 or above a player's own size.

    Example:
        >>> from lightning_nested.games import IteratedPrisonersDilemma
        >>> cut = RandomSubspace(IteratedPrisonersDilemma())
        >>> cut.sizes, [tuple(p.shape) for p in cut.embed(cut.initial())]
        ((1, 1), [(5,), (5,)])
    """

    def __init__(
        self, game: Game, dim: int = 1, generator: torch.Generator | None = None, spread: float = 1.0
    ) -> None:
        if not 1 <= dim <= min(game.sizes):
            raise ValueError(
                f"dim must lie between 1 and the smallest player's size {min(game.sizes)}. Got {dim}."
            )
        if not spread >= 0:
            raise ValueError(f"spread must be non-negative. Got {spread}.")
        generator = generator if generator is not None else torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.game, self.names, self.dim, self.sizes = game, game.names, dim, (dim,) * len(game.sizes)
        self.projections = tuple(normal(n, dim) for n in game.sizes)
        self.offsets = tuple(spread * normal(n) for n in game.sizes)

    def embed(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the players of the whole game, Pᵢ zᵢ + bᵢ."""
        parts = zip(self.projections, self._unpack(players), self.offsets, strict=True)
        return tuple(p.to(z) @ z + b.to(z) for p, z, b in parts)

    def policies(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Return what the embedded players do in the whole game."""
        return self.game.policies(self.embed(players))

    def losses(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute the losses of the whole game at the embedded players."""
        return self.game.losses(self.embed(players))
