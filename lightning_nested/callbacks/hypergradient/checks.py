"""Settings of a run that HypergradientCallback refuses, or warns of."""

from __future__ import annotations

import inspect

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_nested.trainer.requirements import refuse_strategy


def check_settings(trainer: Trainer, module: LightningModule, callback: type[Callback]) -> None:
    """Refuse a module or Trainer that the callback, of this class, cannot work with.

    Raises:
        MisconfigurationException: With a cure.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"HypergradientCallback works with automatic optimization. Got {name} with "
            "automatic_optimization=False; extend lightning_nested.modules.NestedModule for a loop of your own."
        )
    refuse_strategy(trainer, "HypergradientCallback", static_graph=False, shards=True)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    count = sum(isinstance(each, callback) for each in callbacks)
    if count > 1:
        raise MisconfigurationException(
            "One HypergradientCallback tunes all hyperparameters: another's decays would be missing from its "
            f"curvature. Got {count}; give one of them the list."
        )
    if not callable(getattr(module, "outer_loss", None)) and not is_overridden("validation_step", module):
        raise MisconfigurationException(
            f"HypergradientCallback needs an outer loss. Got {name} without outer_loss and validation_step; "
            "add:\ndef outer_loss(self, batch):\n    x, y = batch\n    return F.cross_entropy(self(x), y)"
        )
    if trainer.accumulate_grad_batches > 1:
        signature = inspect.signature(module.backward)
        kinds = [p.kind for p in signature.parameters.values()]
        if "retain_graph" not in signature.parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise MisconfigurationException(
                "With accumulate_grad_batches the graphs are needed again at the window's last batch. Got "
                f"{name}.backward{signature}, which cannot keep one; give it **kwargs and pass them to loss.backward."
            )


def warn_of_own_decay(optimizer: Optimizer) -> None:
    """Warn of an inner optimizer with a weight decay of its own beside the tuned ones."""
    decays = [group.get("weight_decay", 0) for group in optimizer.param_groups]
    if any(decays):
        rank_zero_warn(
            "The inner optimizer has a weight_decay of its own beside the tuned one. Got "
            f"{type(optimizer).__name__} with {decays}; set it to 0, so that the tuned decay is the whole decay."
        )
