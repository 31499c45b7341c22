"""Steps of players that step together, on gradients from one batch or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_nested.games.jacobian import JacobianOperator
from lightning_nested.linalg.processes import Reduce, average, average_gradients
from lightning_nested.linalg.saved import require_keys
from lightning_nested.modules.game.checks import check_losses
from lightning_nested.modules.game.players import Player
from lightning_nested.trainer.isolation import without_trace
from lightning_nested.trainer.lightning import counted, reduction
from lightning_nested.trainer.random_stream import RandomStream

Row: TypeAlias = list[Tensor | None]
"""Loss of one player, then the entries of its gradient; None for a parameter that the loss does not depend on."""


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
        require_keys(state, ("count", "losses", "gradients"), "the gradient sums")
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


class PlayerSteps:
    """Evaluates losses of players of a running game, and steps on their gradients.

    Attributes:
        sums: Losses and gradients of the batches of an open step.
        losses: Last loss of each player.
    """

    def __init__(self) -> None:
        self.sums = GradientSums()
        self.losses: dict[str, Tensor] = {}

    def play(self, module: Any, players: Sequence[Player], batch: Any, *, full: bool, last: bool) -> None:
        """Add the gradients of a batch, and let the players step if it is their step's last.

        Args:
            module: GameModule that runs.
            players: Players that step together.
            batch: The batch.
            full: True for the last batch of the step.
            last: True in the last step of a game update, which ``global_step`` counts.
        """
        if players[0].num_gradients == 1:
            self._evaluate(module, players, batch)
            if full:
                self._set_gradients(module, players)
        else:
            self._look_ahead(module, players, batch)
        module.player_batches.update(player.name for player in players)
        if not full:
            return
        for k, player in enumerate(players):
            with counted(player.optimizer, last and k + 1 == len(players)):
                player.optimizer.step()
            player.clear_gradient()
            module.on_player_step(player.name)

    def _look_ahead(self, module: Any, players: Sequence[Player], batch: Any) -> None:
        """Set the gradients at the extrapolated point, and leave the players there."""
        start = RandomStream.snapshot(module.device)
        with start.replay(), without_trace(module, module.trainer, attributes=False):
            self._evaluate(module, players, batch)
        self._set_gradients(module, players)
        module.step_cache.clear()  # what it holds was computed before the extrapolation
        try:
            for player in players:
                player.extrapolate()
            self._evaluate(module, players, batch)
            self._set_gradients(module, players)
        except BaseException:
            for player in players:
                player.retreat()
            raise

    def _evaluate(self, module: Any, players: Sequence[Player], batch: Any) -> None:
        """Add the players' losses and gradients to the sums."""
        names = [player.name for player in players]
        strength: float = module.loop.consensus
        joint: AbstractContextManager[None] = nullcontext()
        if strength:
            module.on_consensus()
            joint = module.joint_evaluation(names)
        with joint:
            losses = check_losses(module, names, module.player_losses(names, batch))
        where = f"{type(module).__name__}.player_loss"
        with torch.autocast(module.device.type, enabled=False):  # derivatives are taken outside, as always
            if strength:
                self.sums.add(_consensus_gradients(players, losses, strength, reduction(module.trainer)))
            else:
                self.sums.add(_gradients(where, players, losses))
        module.gradient_evaluations += len(players)

    def _set_gradients(self, module: Any, players: Sequence[Player]) -> None:
        """Hand the averaged gradients over, if they are finite: decided from what all processes know."""
        rows = self.sums.take(players, reduction(module.trainer))
        for player, (loss, *gradient) in zip(players, rows, strict=True):
            assert loss is not None
            if not player.is_finite(loss, gradient):
                raise FloatingPointError(
                    f"The loss of {player.name!r} and its gradient must be finite. Got loss {float(loss)} after "
                    f"{module.game_updates} game updates; no player has stepped on it. Lower the learning rate or "
                    "momentum, or clip gradients with GameLoop(gradient_clip_val=...)."
                )
            # A copy: in a distributed run it is a slice of the message with all gradients, which Lightning's
            # launcher would send along with callback_metrics, and wait for ever on a full pipe.
            self.losses[player.name] = loss.clone()
        for player, (_, *gradient) in zip(players, rows, strict=True):
            player.set_gradient(gradient)


def _gradients(where: str, players: Sequence[Player], losses: Sequence[Tensor]) -> list[Row]:
    """Differentiate each loss by its player's parameters alone; ``.grad`` and the hooks of DDP are not involved."""
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


def _consensus_gradients(
    players: Sequence[Player], losses: Sequence[Tensor], strength: float, reduce: Reduce | None
) -> list[Row]:
    """Return each player's part of ξ + γJᵀξ, the gradient of L_i + (γ/2)‖ξ‖²; ξ is of the batch of all processes."""
    jacobian = JacobianOperator(losses, tuple(tuple(player.parameters) for player in players), reduce=reduce)
    gradient = average(tuple(g.detach() for g in jacobian.gradient), reduce)
    pulled = jacobian.rmatvec(gradient)
    total = iter([g + strength * v for g, v in zip(gradient, pulled, strict=True)])
    return [
        [loss.detach(), *(next(total) for _ in player.parameters)]
        for player, loss in zip(players, losses, strict=True)
    ]
