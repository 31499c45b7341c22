"""Losses of a game's players, as callbacks, the progress bar and loggers get them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_nested.modules.game.module import GameModule


def log_losses(module: GameModule, losses: Mapping[str, Tensor]) -> None:
    """Show the losses to callbacks and the progress bar, and to loggers where they are due."""
    trainer = module.trainer
    metrics: dict[str, Any] = {f"{name}_loss": loss for name, loss in losses.items()}
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every > 0 and module.game_updates % every == 0:
        metrics |= module.game_metrics()
        for logger in trainer.loggers:
            logger.log_metrics({k: float(v) for k, v in metrics.items()}, step=module.game_updates)
    # Every time: callbacks monitor them also in an epoch shorter than log_every_n_steps. Not by self.log: it costs
    # as much as a small game's update, to aggregate what nobody asks for.
    shown = {k: torch.as_tensor(v, device=module.device) for k, v in metrics.items()}
    trainer.callback_metrics.update(shown, game_updates=torch.tensor(float(module.game_updates)))
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_metrics.update({k: float(v) for k, v in metrics.items()})
