"""What a checkpoint holds of a perturbation's learned scale and of its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.hypernetworks.loops import ResponseLoop
from lightning_nested.hyperparameters.outer_optimizer import restore_optimizer


def scale_state(scale: Tensor | None, optimizer: Optimizer | None) -> dict[str, Any]:
    """Return the scale and its optimizer's state; None where the scale is not learned."""
    return {
        "scale": None if scale is None else scale.detach().cpu().clone(),
        "scale_optimizer": None if optimizer is None else optimizer.state_dict(),
        "scale_optimizer_class": type(optimizer).__name__,
    }


def load_scale_state(
    state: Mapping[str, Any], scale: Tensor | None, optimizer: Optimizer | None, loop: ResponseLoop
) -> None:
    """Restore both from what :func:`scale_state` returned; an optimizer of another class starts again.

    Raises:
        ValueError: The state is of a loop with another perturbation than ``loop``.
    """
    saved = state["scale"]
    if (saved is None) != (scale is None):
        raise ValueError(
            "The checkpoint must be of a loop that learns the perturbation's scale exactly if this one does. "
            f"Got {loop}."
        )
    if scale is None or optimizer is None:
        return
    if saved.shape != scale.shape:
        raise ValueError(
            f"The saved scale of the perturbation must have shape {tuple(scale.shape)}. Got "
            f"{tuple(saved.shape)}: the checkpoint belongs to another perturbation; got {loop} here."
        )
    with torch.no_grad():
        scale.copy_(saved)
    refused = restore_optimizer(optimizer, state["scale_optimizer"], state.get("scale_optimizer_class"))
    if refused is not None:
        rank_zero_warn(f"HypernetworkModule: the optimizer of the perturbation's scale {refused}")
