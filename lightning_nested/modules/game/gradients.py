"""Gradients of the players of a game: computed, summed over batches, averaged over processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_nested.linalg.processes import average_gradients
from lightning_nested.linalg.vectors import Reduce
from lightning_nested.modules.game.players import Player

Gradient = list[Tensor | None]


def player_gradients(
    where: str, players: Sequence[Player], losses: Sequence[Tensor]
) -> tuple[list[Tensor], list[Gradient]]:
    """Return each player's loss, and its gradient with respect to that player's parameters alone.

    Nothing is accumulated into ``.grad`` and no hook of ``DistributedDataParallel`` fires.

    Raises:
        MisconfigurationException: A loss does not depend on its player's parameters.
    """
    gradients: list[Gradient] = []
    for k, (player, loss) in enumerate(zip(players, losses, strict=True)):
        # Losses may share a graph; the last one frees its memory on the way.
        retain = k + 1 < len(losses)
        gradient = torch.autograd.grad(loss, player.parameters, retain_graph=retain, allow_unused=True)
        if all(g is None for g in gradient):
            raise MisconfigurationException(
                f"The loss of {player.name!r} must depend on its parameters. Got one from {where} that depends "
                "on none of them; check that its path is not detached and that names are not exchanged."
            )
        gradients.append(list(gradient))
    return [loss.detach() for loss in losses], gradients


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
        self._losses: list[Tensor] = []
        self._gradients: list[Gradient] = []

    def add(self, losses: list[Tensor], gradients: list[Gradient]) -> None:
        """Add the losses and gradients of another batch."""
        self.count += 1
        if self.count == 1:
            self._losses, self._gradients = losses, gradients
            return
        self._losses = [a + b for a, b in zip(self._losses, losses, strict=True)]
        self._gradients = [
            [b if a is None else a if b is None else a + b for a, b in zip(mine, new, strict=True)]
            for mine, new in zip(self._gradients, gradients, strict=True)
        ]

    def take(self, players: Sequence[Player], reduce: Reduce | None) -> tuple[list[Tensor], list[Gradient]]:
        """Return means over batches and processes, and clear the sums."""
        losses, gradients, count = self._losses, self._gradients, self.count
        self.clear()
        if count > 1:
            losses = [loss / count for loss in losses]
            gradients = [[None if g is None else g / count for g in each] for each in gradients]
        return _averaged(players, losses, gradients, reduce)

    def state_dict(self, players: Sequence[Player], reduce: Reduce | None) -> dict[str, Any]:
        """Return the open sums, averaged, so that every process may continue them."""
        losses, gradients = _averaged(players, self._losses, self._gradients, reduce)
        return {"count": self.count, "losses": losses, "gradients": gradients}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue saved sums."""
        self.count = state["count"]
        self._losses = [loss.to(device) for loss in state["losses"]]
        self._gradients = [[None if g is None else g.to(device) for g in each] for each in state["gradients"]]


def _averaged(
    players: Sequence[Player], losses: list[Tensor], gradients: list[Gradient], reduce: Reduce | None
) -> tuple[list[Tensor], list[Gradient]]:
    """Average losses and gradients over processes, in one message."""
    if reduce is None or not losses:
        return losses, gradients
    like = [p for player in players for p in player.parameters] + losses
    with torch.no_grad():
        sent: Gradient = [*(g for each in gradients for g in each), *losses]
        means = iter(average_gradients(sent, like, reduce))
        averaged = [[next(means) for _ in each] for each in gradients]
    return [loss for loss in means if loss is not None], averaged
