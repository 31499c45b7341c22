"""Inner problem of a nested module: losses, parameters, clipping and real steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_nested.hyperparameters import OuterStep
from lightning_nested.linalg.graph import HIDDEN, hides_layers
from lightning_nested.linalg.vectors import norm
from lightning_nested.trainer.lightning import step_loss
from lightning_nested.trainer.outer_batches import OuterBatches
from lightning_nested.trainer.outer_loss import evaluate_outer
from lightning_nested.trainer.self_check import SelfCheck


@dataclass(frozen=True, kw_only=True, eq=False)
class InnerProblem:
    """Losses, parameters and batches that a cycle of a nested module works on.

    Attributes:
        module: Module, not wrapped by DDP: the cycle averages its gradients, in one message.
        optimizer: Optimizer of the inner ``parameters``.
        batches: Batches of the outer loss.
        accumulate: Batches per inner step.
        check: Checks of the first outer step.
    """

    module: LightningModule
    inner_loss: Callable[[Any], Tensor]
    outer_loss: Callable[[Any], Tensor]
    optimizer: LightningOptimizer
    parameters: dict[str, nn.Parameter]
    outer: OuterStep
    batches: OuterBatches
    accumulate: int
    clip: float | None
    clip_algorithm: Literal["norm", "value"]
    check: SelfCheck = field(default_factory=lambda: SelfCheck("", enabled=False))

    def evaluate_outer(
        self,
        evaluate: Callable[[Callable[[Any], Tensor], Any], Tensor],
        tensors: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return the outer loss of the next outer batch; see :func:`evaluate_outer`."""
        return evaluate_outer(
            self.module.trainer,
            self.module,
            self.batches,
            lambda batch: check_loss("outer_loss", self.module, evaluate(self.outer_loss, batch)),
            tensors,
            attributes=False,
            caller=f"{type(self.module).__name__} at training step {self.module.trainer.global_step}",
        )

    def full_precision(self) -> torch.autocast:
        """Leave autocast for derivatives, as in any training."""
        return torch.autocast(self.module.device.type, enabled=False)

    def limit(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Return clipped gradients, differentiable; as ``clip_grad_norm_`` and ``clip_grad_value_`` of torch."""
        present = [g for g in gradients if g is not None]
        if self.clip is None or not present:
            return gradients
        if self.clip_algorithm == "value":
            return [None if g is None else g.clamp(-self.clip, self.clip) for g in gradients]
        factor = (self.clip / (norm(tuple(present)) + 1e-6)).clamp(max=1.0)
        return [None if g is None else g * factor for g in gradients]

    def real_step(self, gradients: list[Tensor | None]) -> None:
        """Make a step of the user's optimizer."""
        self.put_gradients(gradients)
        self.optimizer.step()

    def put_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Put gradients into ``.grad``."""
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.detach()


# Losses whose graphs were searched for reentrant checkpointing: once is enough, every step would be too dear.
_SHOWN: WeakKeyDictionary[LightningModule, set[tuple[str, str | None]]] = WeakKeyDictionary()


def modules_outer_loss(trainer: Trainer, module: LightningModule, batch: Any, index: int) -> Tensor:
    """Return the module's ``outer_loss(batch)`` if it has one, else what its ``validation_step`` returns."""
    own, name = getattr(module, "outer_loss", None), "outer_loss"
    if callable(own):
        loss = own(batch)
    else:
        name, loss = "validation_step", step_loss(trainer, module, "validation_step", batch, index)
    return check_loss(name, module, loss, may_hide=trainer.world_size == 1)


def check_loss(
    name: str, module: LightningModule, loss: object, *, player: str | None = None, may_hide: bool = False
) -> Tensor:
    """Return the loss (of a player of a game); refuse what is not a scalar with its graph, to every layer.

    Args:
        name: Method that returned it.
        module: Its module.
        loss: What it returned.
        player: Player of a game.
        may_hide: Whether layers may be hidden by reentrant checkpointing.
    """
    where, whose = f"{type(module).__name__}.{name}", "" if player is None else f" for {player!r}"
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise MisconfigurationException(
            f"{where} must return a scalar tensor{whose}. Got {got}; return the mean loss."
        )
    if not loss.requires_grad:
        raise MisconfigurationException(
            f"{where} must return a tensor with its graph{whose}. Got one that does not require gradients: remove "
            "torch.no_grad() and .detach() from its computation."
        )
    seen = _SHOWN.setdefault(module, set())
    if (name, player) not in seen:
        if not may_hide and hides_layers(loss):
            raise MisconfigurationException(f"{where}: {HIDDEN}")
        seen.add((name, player))
    return loss.reshape(())
