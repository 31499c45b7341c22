"""Losses of all players at one point of a running game, each with its graph to every player."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_nested.linalg.vectors import Vector
from lightning_nested.trainer.isolation import without_trace
from lightning_nested.trainer.random_stream import RandomStream


class RunningPlayer(Protocol):
    """Protocol of a player in ``fit``: Lightning's wrapper of its optimizer, and the parameters that it trains."""

    optimizer: LightningOptimizer
    parameters: Vector


@runtime_checkable
class RunningGame(Protocol):
    """Protocol of a GameModule in ``fit``, for packages that modules import."""

    game_updates: int
    update: str
    steps_per_player: dict[str, int]
    running_players: dict[str, RunningPlayer]

    def joint_evaluation(self, players: Sequence[str]) -> AbstractContextManager[None]:
        """Let losses keep their graphs to every player inside, and share nothing with training."""

    def player_losses(self, names: Sequence[str], batch: Any) -> Mapping[str, Tensor]:
        """Return the losses of players that step together."""


def joint_losses(
    module: RunningGame,
    names: Sequence[str],
    batch: Any,
    stream: RandomStream,
    *,
    prepare: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Evaluate the losses of these players with graphs to every player, without side effects.

    The stream stays at its position, so that a second call repeats the evaluation. ``prepare`` is called first,
    and its changes are undone too.
    """
    assert isinstance(module, LightningModule)
    with (
        stream.replay(),
        without_trace(module, module.trainer),
        module.joint_evaluation(names),
        torch.enable_grad(),
    ):
        prepare()
        losses = module.player_losses(names, batch)
    return [losses[name].reshape(()) for name in names]


def warn_if_detached(names: Sequence[str], losses: Sequence[Tensor], tensors: Sequence[Vector]) -> None:
    """Warn where a loss has no graph to a player: a spectrum without that coupling looks harmless, and is wrong."""
    for name, loss in zip(names, losses, strict=True):
        for other, held in zip(names, tensors, strict=True):
            if all(g is None for g in torch.autograd.grad(loss, held, retain_graph=True, allow_unused=True)):
                rank_zero_warn(
                    f"The loss of {name!r} has no graph to the parameters of {other!r}. If it depends on them, the "
                    "spectrum lacks that coupling: in player_loss, do not detach and do not use torch.no_grad() "
                    "where self.joint_graph is True."
                )


def is_game(module: object) -> bool:
    """Return True if ``module`` follows the GameModule protocol."""
    return isinstance(module, RunningGame)


def refuse_other_modules(module: LightningModule) -> None:
    """Refuse manual optimization, except in a game.

    Raises:
        MisconfigurationException: With a cure.
    """
    if not module.automatic_optimization and not is_game(module):
        raise MisconfigurationException(
            "LyapunovCallback works with automatic optimization, and with games. Got "
            f"{type(module).__name__} with automatic_optimization=False; use lightning_nested.dynamics.TrainingTracker "
            "in a loop of your own, or extend GameModule."
        )
