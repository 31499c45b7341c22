"""What a game update costs in the Trainer beyond a loop written by hand: the bilinear game, one number a player.

CPU time of a game update of a :class:`GameModule` (no logger, no callbacks) and of the same update by hand, with
ComplexSGD in both; interleaved, without the first 50 updates.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_nested.modules import GameModule
from lightning_nested.optim import ComplexSGD

_WARM = 50


class Player(nn.Module):
    """One number."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(1, dtype=torch.float64))


class Game(GameModule):
    """min over x, max over y of xy."""

    def __init__(self, **options: Any) -> None:
        super().__init__(optimizer=lambda params: ComplexSGD(params, lr=0.1), **options)
        self.x, self.y = Player(), Player()
        self.times: list[float] = []

    def players(self) -> dict[str, nn.Module]:
        """Both."""
        return {"x": self.x, "y": self.y}

    def player_loss(self, name: str, batch: Any) -> Tensor:
        """± xy."""
        product = (self.x.value * self.y.value).sum()
        return product if name == "x" else -product

    def train_dataloader(self) -> range:
        """Batches that say nothing."""
        return range(10**6)

    def on_game_update(self) -> None:
        """When it was complete."""
        self.times.append(time.process_time())


def in_the_trainer(updates: int, update: str) -> float:
    """Seconds of CPU per game update."""
    module = Game(update=update)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        max_steps=updates,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return (module.times[-1] - module.times[_WARM]) / (updates - 1 - _WARM)


def by_hand(updates: int, update: str) -> float:
    """Likewise."""
    x, y = Player(), Player()
    pairs = [(x, ComplexSGD(x.parameters(), lr=0.1), 1.0), (y, ComplexSGD(y.parameters(), lr=0.1), -1.0)]
    times = []
    for _ in range(updates):
        for player, optimizer, sign in pairs:
            loss = sign * (x.value * y.value).sum()
            (player.value.grad,) = torch.autograd.grad(loss, [player.value])
            if update == "alternating":
                optimizer.step()
        if update == "simultaneous":
            for _, optimizer, _ in pairs:
                optimizer.step()
        for _, optimizer, _ in pairs:
            optimizer.zero_grad()
        times.append(time.process_time())
    return (times[-1] - times[_WARM]) / (updates - 1 - _WARM)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, list[float]]]:
    """Print quartiles in milliseconds; return them."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--updates", type=int, default=250)
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = {}
    gc.disable()
    for update in ("simultaneous", "alternating"):
        times: dict[str, list[float]] = {"by hand": [], "GameModule": []}
        in_the_trainer(_WARM + 2, update)
        for _ in range(given.rounds):
            times["by hand"].append(1e3 * by_hand(given.updates, update))
            times["GameModule"].append(1e3 * in_the_trainer(given.updates, update))
            gc.collect()
        times["added"] = [a - b for a, b in zip(times["GameModule"], times["by hand"], strict=True)]
        found[update] = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
        print(update, {name: [round(q, 3) for q in quartiles] for name, quartiles in found[update].items()})
    gc.enable()
    return found


if __name__ == "__main__":
    main()
