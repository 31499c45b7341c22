"""Losses and gradients of the players of a game: computed, summed over batches, averaged over processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_nested.linalg.processes import Reduce, average_gradients
from lightning_nested.modules.game.players import Player

Row: TypeAlias = list[Tensor | None]
"""Loss of one player, then the entries of its gradient; None for a parameter that the loss does not depend on."""


def player_gradients(where: str, players: Sequence[Player], losses: Sequence[Tensor]) -> list[Row]:
    """Differentiate each player's loss with respect to that player's parameters alone.

    Nothing is accumulated into ``.grad`` and no hook of ``DistributedDataParallel`` fires.

    Raises:
        MisconfigurationException: A loss does not depend on its player's parameters.
    """
    rows: list[Row] = []
    for k, (player, loss) in enumerate(zip(players, losses, strict=True)):
        # Losses may share a graph; the last one frees its memory on the way.
        retain = k + 1 < len(losses)
        gradient = torch.autograd.grad(loss, player.parameters, retain_graph=retain, allow_unused=True)
        if all(g is None for g in gradient):
            raise MisconfigurationException(
                f"The loss of {player.name!r} must depend on its parameters. Got one from {where} that depends "
                "on none of them; check that its path is not detached and that names are not exchanged."
            )
        rows.append([loss.detach(), *gradient])
    return rows


class GradientSums:
    """Losses and gradients of one step of the schedule, summed over its batches.

    Attributes:
        count: Batches so far.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the batches so far."""
        self.count = 0
        self._rows: list[Row] = []

    def add(self, rows: list[Row]) -> None:
        """Add another batch."""
        if self.count:
            rows = [
                [b if a is None else a if b is None else a + b for a, b in zip(mine, new, strict=True)]
                for mine, new in zip(self._rows, rows, strict=True)
            ]
        self.count, self._rows = self.count + 1, rows

    def take(self, players: Sequence[Player], reduce: Reduce | None) -> list[Row]:
        """Return means over batches and processes, and clear the sums."""
        rows, count = self._averaged(players, reduce), self.count
        self.clear()
        return rows if count == 1 else [[None if a is None else a / count for a in row] for row in rows]

    def state_dict(self, players: Sequence[Player], reduce: Reduce | None) -> dict[str, Any]:
        """Return the open sums, averaged, so that every process may continue them."""
        rows = self._averaged(players, reduce)
        return {
            "count": self.count,
            "losses": [row[0] for row in rows],
            "gradients": [row[1:] for row in rows],
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue saved sums."""
        self.count = state["count"]
        saved = zip(state["losses"], state["gradients"], strict=True)
        self._rows = [
            [None if a is None else a.to(device) for a in (loss, *gradient)] for loss, gradient in saved
        ]

    def _averaged(self, players: Sequence[Player], reduce: Reduce | None) -> list[Row]:
        """Return the sums averaged over processes, in one message."""
        if reduce is None or not self._rows:
            return self._rows
        pairs = zip(players, self._rows, strict=True)
        like = [t for player, row in pairs for t in (row[0], *player.parameters) if t is not None]
        with torch.no_grad():
            means = iter(average_gradients([a for row in self._rows for a in row], like, reduce))
            return [[next(means) for _ in row] for row in self._rows]
