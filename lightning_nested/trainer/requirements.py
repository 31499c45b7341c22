"""Refuse Trainer settings that a callback or module cannot work with."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_nested.trainer.lightning import has_static_graph


def refuse_other_lightning(trainer: object, who: str) -> None:
    """Refuse a Trainer of the twin package ``pytorch_lightning``, whose classes are others, for class ``who``.

    Raises:
        MisconfigurationException: With a cure.
    """
    packages = {base.__module__.partition(".")[0] for base in type(trainer).__mro__}
    if not isinstance(trainer, Trainer) and "pytorch_lightning" in packages:
        raise MisconfigurationException(
            f"{who} must be used with the package lightning.pytorch. Got a Trainer of pytorch_lightning, whose classes "
            "are different ones; replace `import pytorch_lightning as pl` by `import lightning.pytorch as pl` "
            "everywhere."
        )


def refuse_strategy(trainer: Trainer, who: str, *, static_graph: bool = True, shards: bool = False) -> None:
    """Refuse strategies that shard parameters or own the backward pass, in the name of class ``who``.

    ``shards`` allows FSDP2, whose parameters can be read and moved.

    Raises:
        MisconfigurationException: Also where DDP takes the graph to be static, if not ``static_graph``.
    """
    strategy = trainer.strategy
    if shards and isinstance(strategy, ModelParallelStrategy):
        return
    whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    # DeepSpeed and XLA are kinds of DDP to Lightning, and keep parameters and gradients elsewhere.
    if not whole or isinstance(strategy, DeepSpeedStrategy | XLAStrategy):
        raise MisconfigurationException(
            f"{who} needs whole parameters on every process: a single device or DDP. "
            f"Got {type(strategy).__name__}; use Trainer(strategy='ddp')"
            f"{', or FSDP2 (ModelParallelStrategy)' if shards else ''}."
        )
    if not static_graph and has_static_graph(trainer):
        # DDP queues its first all-reduce in the first derivative that passes, which here is not its own.
        raise MisconfigurationException(
            f"{who} differentiates the training loss before DDP does, so DDP must not take the graph to be static. "
            "Got DDPStrategy(static_graph=True); leave it out."
        )


def refuse_loss_scaling(trainer: Trainer, who: str, why: str = "") -> None:
    """Refuse a precision that scales losses (fp16), in the name of class ``who``, which steps optimizers itself.

    Raises:
        MisconfigurationException: With a cure.
    """
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            f"{who} scales no losses{why}. Got precision={trainer.precision}; use 'bf16-mixed'."
        )


def require_hooks(ran: bool, module: LightningModule, who: str, hooks: str) -> None:
    """Refuse to go on where ``hooks`` of class ``who`` have not run, because a subclass overrides one.

    Raises:
        MisconfigurationException: With a cure.
    """
    if not ran:
        raise MisconfigurationException(
            f"{who} must be started by its hooks ({hooks}). "
            f"Got a {type(module).__name__} that overrides one without calling super()'s."
        )
