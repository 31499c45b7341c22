"""A differentiable game: one loss per player, each of them a function of what every player holds."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Game(ABC):
    """Base of the zoo's games: ``losses(players)`` and ``initial(generator)``, and nothing that changes in between.

    A player is a tensor of shape ``(n_i,)``; a tuple of players goes in, a tuple of scalar losses comes out, and
    every player wants its own to be low. Games are small: float64 is their default dtype, but any dtype goes in.

    Attributes:
        names: Names of the players, for tables and figures.
        sizes: Numbers that each player holds.
    """

    names: tuple[str, ...] = ("first", "second")
    sizes: tuple[int, ...] = (1, 1)

    @abstractmethod
    def losses(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute the loss of every player, scalars with graphs, from a tensor of shape ``(n_i,)`` each."""

    def policies(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Return what each player does, as probabilities; None in a game of other things."""
        return None

    def initial(
        self, generator: torch.Generator | None = None, *, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, ...]:
        """Draw standard normal players, leaves that require gradients, so that an optimizer takes them as they are."""
        return tuple(
            torch.randn(n, generator=generator, dtype=dtype).requires_grad_(True) for n in self.sizes
        )

    def _unpack(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the players after a check of their number and shapes."""
        got = tuple(tuple(p.shape) for p in players)
        if got != tuple((n,) for n in self.sizes):
            raise ValueError(
                f"The players of {type(self).__name__} must be tensors of shapes {[(n,) for n in self.sizes]}. "
                f"Got {list(got)}; `game.initial()` gives such players."
            )
        return players
