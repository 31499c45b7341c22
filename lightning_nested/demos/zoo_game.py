"""Game of the zoo as a LightningModule, to watch an optimizer on a game with a known solution."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_nested.arguments import at_least, check
from lightning_nested.games import Game
from lightning_nested.modules.game.module import GameModule


class ZooGame(GameModule):
    """Module that trains a :class:`Game` and logs its players' distance from a solution as ``distance``.

    It brings its own data, batches without content. Training is in float64.

    Args:
        game: Game to train, such as ``DiracGAN()`` or ``Bilinear()``.
        start: Start of each player, a list of numbers; None: standard normal.
        solution: Point that ``distance`` is measured from, a list of numbers for each player; None: 0.
        seed: Seed of a random start.
        batches_per_epoch: Number of empty batches.
        **game_options: Arguments of :class:`GameModule`.

    Attributes:
        distances: ‖w − solution‖ at the start and after each game update of this run.
        path: The players' numbers at the same moments, one flat list each.

    Example:
        >>> from lightning_nested.games import DiracGAN
        >>> module = ZooGame(DiracGAN(), start=[[3.0], [4.0]])
        >>> list(module.players()), module.distance().item()
        (['discriminator', 'generator'], 5.0)
    """

    def __init__(
        self,
        game: Game,
        *,
        start: list[list[float]] | None = None,
        solution: list[list[float]] | None = None,
        seed: int = 0,
        batches_per_epoch: int = 1000,
        **game_options: Any,
    ) -> None:
        check(ZooGame.__init__, locals())
        super().__init__(**game_options)
        at_least(1, batches_per_epoch=batches_per_epoch)
        at_least(0, seed=seed)
        self.game, self.batches_per_epoch = game, batches_per_epoch
        random = torch.Generator().manual_seed(seed)
        values = game.initial(random) if start is None else self._fit("start", start)
        self.strategies = nn.ModuleDict()
        for name, value in zip(game.names, values, strict=True):
            self.strategies[name] = nn.ParameterDict({"value": value.detach().clone()})
        at = [[0.0] * n for n in game.sizes] if solution is None else solution
        self.solution: Tensor
        self.register_buffer("solution", torch.cat(self._fit("solution", at)))
        self.distances: list[float] = []
        self.path: list[list[float]] = []

    @override
    def players(self) -> dict[str, nn.Module]:
        return dict(self.strategies.items())

    @override
    def player_losses(self, names: Sequence[str], batch: Any) -> dict[str, Tensor]:
        by_name = dict(zip(self.strategies, self.game.losses(self._point()), strict=True))
        return {name: by_name[name] for name in names}

    @override
    def player_loss(self, name: str, batch: Any) -> Tensor:
        return self.player_losses([name], batch)[name]

    def distance(self) -> Tensor:
        """Return ‖w − solution‖ over all players."""
        w = torch.cat(self._point()).detach()
        return torch.linalg.vector_norm(w - self.solution)  # type: ignore[no-any-return]

    @override
    def game_metrics(self) -> dict[str, Any]:
        return {"distance": self.distance()}

    @override
    def train_dataloader(self) -> Iterable[int]:
        return range(self.batches_per_epoch)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.game_updates == 0:
            self.distances, self.path = [], []
        if not self.distances:
            self.on_game_update()

    @override
    def on_game_update(self) -> None:
        self.distances.append(float(self.distance()))
        self.path.append(torch.cat(self._point()).tolist())

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["path"] = {"distances": self.distances, "path": self.path}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get("path", {"distances": [], "path": []})
        self.distances, self.path = list(kept["distances"]), list(kept["path"])

    def _point(self) -> tuple[Tensor, ...]:
        return tuple(self.strategies.parameters())

    def _fit(self, what: str, values: Sequence[Sequence[float]]) -> list[Tensor]:
        tensors = [torch.tensor(value, dtype=torch.float64) for value in values]
        sizes = [t.numel() for t in tensors]
        if sizes != list(self.game.sizes):
            raise ValueError(
                f"{what} must have {list(self.game.sizes)} numbers for {list(self.game.names)}. Got {sizes}."
            )
        return tensors
