"""Lookahead-minimax: all players step back towards where they were some updates ago."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_nested.arguments import at_least, checked, within
from lightning_nested.linalg.saved import require_keys
from lightning_nested.trainer.use import OneFitCallback


@checked
class Lookahead(OneFitCallback):
    """Every k updates w ← w̃ + a(w − w̃) for all players at once, then w̃ ← w: the optimizers' path is cut short.

    Where players turn around a solution, the mean of two points of the circle is nearer to it; gradient steps that
    spiral outwards then converge (:func:`lookahead_rate`). Works with any optimizers, and in any module: an update is a
    step of ``trainer.global_step``, a round of all players in a :class:`GameModule`. Optimizers keep their state.
    Buffers such as batch-norm statistics are those of the last step.

    Chavdarova, Pagliardini, Stich, Fleuret & Jaggi (2021), ICLR, arXiv 2006.14567; for one player Zhang, Lucas,
    Hinton & Ba (2019), NeurIPS, arXiv 1907.08610.

    Args:
        every_n_updates: k.
        alpha: a in [0, 1].
    """

    def __init__(self, every_n_updates: int = 5, *, alpha: float = 0.5) -> None:
        at_least(1, every_n_updates=every_n_updates)
        within(0, 1, alpha=alpha)
        self.every_n_updates, self.alpha = every_n_updates, alpha
        # w̃ by the parameters' names.
        self._slow: dict[str, Tensor] = {}
        self._last = 0
        self._loaded = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.use.changed and not self._loaded:
            self._slow, self._last = {}, 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loaded = False
        for name, parameter in _trained(trainer, pl_module).items():
            kept = self._slow.get(name, parameter.detach())
            self._slow[name] = kept.to(parameter, copy=True)

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        updates = trainer.global_step
        if updates == self._last or updates % self.every_n_updates:
            return
        self._last = updates
        for name, parameter in _trained(trainer, pl_module).items():
            # One that was unfrozen since starts here.
            slow = self._slow.setdefault(name, parameter.detach().clone())
            slow.lerp_(parameter, self.alpha)
            # Not seen by autograd: a graph that somebody keeps may hold the parameter.
            parameter.data.copy_(slow)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_updates=self.every_n_updates, alpha=self.alpha)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last, "slow": {name: value.clone() for name, value in self._slow.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        require_keys(state_dict, ("last", "slow"), "Lookahead")
        self._last, self._slow, self._loaded = state_dict["last"], dict(state_dict["slow"]), True


def _trained(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """Return the parameters that an optimizer steps on, by name."""
    held = {id(p) for optimizer in trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
    return {name: p for name, p in module.named_parameters() if id(p) in held}
