"""Losses of all players at one point of a running game."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_nested.linalg.vectors import Vector


def warn_if_detached(names: list[str], losses: list[Tensor], tensors: Sequence[Vector]) -> None:
    """Warn where a loss has no graph to a player: a spectrum without their coupling looks harmless, and is wrong."""
    for name, loss in zip(names, losses, strict=True):
        for other, held in zip(names, tensors, strict=True):
            if all(g is None for g in torch.autograd.grad(loss, held, retain_graph=True, allow_unused=True)):
                rank_zero_warn(
                    f"The loss of {name!r} has no graph to the parameters of {other!r}. If it depends on them, the "
                    "spectrum lacks that coupling: in player_loss, do not detach and do not use torch.no_grad() "
                    "where self.joint_graph is True."
                )


def is_game(module: object) -> bool:
    """Return True if ``module`` follows the protocol of GameModule."""
    return all(hasattr(module, name) for name in ("player_losses", "joint_evaluation", "game_updates"))


def refuse_other_modules(module: Any) -> None:
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
