"""Parameters of the inner optimizer, by their names in the module."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_nested.optim.step_dynamics import shaped, trainable
from lightning_nested.trainer.outer_loop import OuterLoop
from lightning_nested.trainer.shards import check_shards, gather_anew, shards_parameters


def named_parameters(
    trainer: Trainer, module: nn.Module, loop: OuterLoop, *, wait: bool = False
) -> dict[str, nn.Parameter]:
    """Return the parameters that the inner optimizer moves, without those of lazy layers that no batch has reached.

    Args:
        trainer: Trainer with the inner optimizer, without hyperparameters.
        module: Module whose names they get.
        loop: Outer loop with those it moved before, of this fit or an earlier one; its decays learn the names of
            the lazy ones.
        wait: Whether to return none while there is a lazy one, if it moved none before: the first batch is still to
            come.

    Raises:
        MisconfigurationException: It moves none; or some are in shards, and others are not.
    """
    in_shards = shards_parameters(trainer)
    if in_shards:
        # Gathered parameters are others.
        gather_anew(module)
    names = {id(p): n for n, p in module.named_parameters()}
    held, every = shaped(trainer.optimizers[0]), trainable(trainer.optimizers[0])
    before = len(loop.parameters)
    if wait and not before and len(held) < len(every):
        return {}
    if not held:
        raise MisconfigurationException(
            "The inner optimizer must hold at least one parameter that is not a hyperparameter. Got none."
        )
    if before not in (0, len(held)):
        rank_zero_info(
            f"HypergradientCallback: the inner optimizer moves {len(held)} tensors from now on, {before} before."
        )
    for decay in loop.outer.decays:
        decay.awaited = tuple(names[id(p)] for p in every if is_lazy(p) and id(p) in names)
    found = {names.get(id(p), f"parameter{i}"): p for i, p in enumerate(held)}
    if in_shards:
        check_shards(found)
    return found
