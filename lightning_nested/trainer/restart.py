"""Restarts of the inner problem: new initial weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_nested.trainer.random_stream import RandomStream


@torch.no_grad()
def reinitialize(
    module: nn.Module, initial: Mapping[str, Tensor], parameters: Mapping[str, Tensor], seed: int
) -> None:
    """Draw new initial weights by each submodule's ``reset_parameters``, the same on every process.

    Submodules are reset if all parameters that they own are among ``parameters``: not what is frozen or tuned.
    Parameters that no ``reset_parameters`` reaches take their ``initial`` values.
    """
    inner = {id(p) for p in parameters.values()}
    for name, parameter in parameters.items():
        parameter.copy_(initial[name])
    with RandomStream(seed, next(iter(parameters.values())).device):
        for submodule in module.modules():
            reset = getattr(submodule, "reset_parameters", None)
            own = [id(p) for p in submodule.parameters(recurse=False)]
            if callable(reset) and own and inner.issuperset(own):
                reset()
