"""Games: several players, each with its own loss and optimizer."""

from lightning_nested.modules.game.loop import GameLoop
from lightning_nested.modules.game.module import GameModule

__all__ = [
    "GameLoop",
    "GameModule",
]
