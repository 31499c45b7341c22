"""An optimizer's option that moves during training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nested.anneal import Anneal, ends
from lightning_nested.arguments import at_least, checked, fraction

# Options that are an entry of the pair "betas".
_BETAS = {"beta1": 0, "beta2": 1}


@checked
class AnnealOptimizer(Callback):
    """Set one option of the optimizers to an annealed value before every batch, for example Adam's β₂.

    The value depends on ``trainer.global_step`` alone (updates of the game in a :class:`GameModule`), so a resumed run
    goes on as if it had not stopped.

    Args:
        anneal: Values over updates.
        option: ``"beta1"`` or ``"beta2"``, an entry of ``betas``, or the name of another number in the optimizer's
            groups, such as ``"weight_decay"`` or ``"momentum"``.
        player: Player of a :class:`GameModule` whose optimizer is changed; None: all optimizers.

    Raises:
        MisconfigurationException: In ``fit``: an optimizer without the option, an unknown player, or ``"lr"`` beside a
            scheduler.
    """

    def __init__(self, anneal: Anneal, option: str = "beta2", *, player: str | None = None) -> None:
        if option in _BETAS:
            fraction(anneal=ends(anneal))
        elif option in ("lr", "weight_decay", "momentum"):
            at_least(0, anneal=ends(anneal))
        self.anneal, self.option, self.player = anneal, option, player

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.option == "lr" and trainer.lr_scheduler_configs:
            raise MisconfigurationException(
                "AnnealOptimizer(option='lr') needs optimizers without a learning-rate scheduler, which sets lr too. "
                f"Got {len(trainer.lr_scheduler_configs)} scheduler(s); leave one of them out."
            )
        for optimizer in self._optimizers(trainer, pl_module):
            for group in optimizer.param_groups:
                self._check(group, optimizer)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        value = self.anneal.at(trainer.global_step)
        for optimizer in self._optimizers(trainer, pl_module):
            for group in optimizer.param_groups:
                if self.option in _BETAS:
                    betas = list(group["betas"])
                    betas[_BETAS[self.option]] = value
                    group["betas"] = tuple(betas)
                else:
                    group[self.option] = value

    def _optimizers(self, trainer: Trainer, pl_module: LightningModule) -> list[Optimizer]:
        if self.player is None:
            return list(trainer.optimizers)
        players: dict[str, Any] = getattr(pl_module, "running_players", {})
        if self.player not in players:
            raise MisconfigurationException(
                f"AnnealOptimizer(player=...) must name a player of a GameModule. Got {self.player!r} and players "
                f"{sorted(players)} of {type(pl_module).__name__}; leave player out to change all optimizers."
            )
        return [players[self.player].optimizer.optimizer]

    def _check(self, group: dict[str, Any], optimizer: Optimizer) -> None:
        known = sorted(k for k, v in group.items() if isinstance(v, int | float) and not isinstance(v, bool))
        if "betas" in group:
            known += list(_BETAS)
        if self.option not in known:
            raise MisconfigurationException(
                f"AnnealOptimizer(option=...) must name a number of the optimizer's. Got {self.option!r} for "
                f"{type(optimizer).__name__}, which has {', '.join(known)}."
            )
