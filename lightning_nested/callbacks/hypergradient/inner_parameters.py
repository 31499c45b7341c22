"""Parameters of the inner optimizer, by their names in the module."""

from __future__ import annotations

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_nested.optim.step_dynamics import trainable


def named_parameters(module: nn.Module, optimizer: Optimizer, before: int) -> dict[str, nn.Parameter]:
    """Return the parameters that the inner optimizer moves; none while the shape of a lazy one is not known yet.

    Args:
        module: Module whose names they get.
        optimizer: Inner optimizer, without hyperparameters.
        before: Number of those it moved before, to report that more or fewer are moved from now on.

    Raises:
        MisconfigurationException: It moves none.
    """
    names = {id(p): n for n, p in module.named_parameters()}
    held = trainable(optimizer)
    if not held:
        raise MisconfigurationException(
            "The inner optimizer must hold at least one parameter that is not a hyperparameter. Got none."
        )
    if any(map(is_lazy, held)):
        return {}
    if before not in (0, len(held)):
        rank_zero_info(
            f"HypergradientCallback: the inner optimizer moves {len(held)} tensors from now on, {before} before."
        )
    return {names.get(id(p), f"parameter{i}"): p for i, p in enumerate(held)}
