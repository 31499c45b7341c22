"""Growth of a tangent by brute force: two whole trainings that begin a little to either side, and their difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor

from lightning_nested.modules import GameModule
from tests.cases import DOUBLE
from tests.trainers import trainer


def run(
    make: Callable[[], LightningModule],
    loader: Callable[[], Any],
    *callbacks: Any,
    shift: float = 0.0,
    tangent: Tensor | None = None,
    **options: Any,
) -> tuple[LightningModule, Tensor]:
    """A fit from a start moved by ``shift`` along ``tangent``: the module, and where parameters and buffers end."""
    module = make()
    if tangent is not None:
        at = 0
        players = module.players().values() if isinstance(module, GameModule) else [module]
        for p in (p for player in players for p in player.parameters()):
            if p.requires_grad:
                p.data.add_(tangent[at : at + p.numel()].view_as(p), alpha=shift)
                at += p.numel()
    seed_everything(5, verbose=False)
    fit = trainer(*callbacks, **options)
    fit.fit(module, loader())
    return module, final_state(fit)


def final_state(fit: Trainer) -> Tensor:
    """Parameters and buffers of every optimizer, flat; no step counts."""
    found = []
    for optimizer in fit.optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    kept = optimizer.state.get(p, {})
                    found += [p.detach(), *(v for k, v in sorted(kept.items()) if k != "step")]
    if not found:  # it ran in other processes
        return torch.empty(0)
    return torch.cat([f.reshape(-1) for f in found if isinstance(f, Tensor) and f.ndim])


def growth(
    make: Callable[[], LightningModule],
    loader: Callable[[], Any],
    tangent: Tensor,
    *,
    size: float = 1e-6,
    **options: Any,
) -> float:
    """ln of the length to which a unit tangent grows over the whole run, by central differences."""
    ahead, behind = (run(make, loader, shift=s, tangent=tangent, **options)[1] for s in (size, -size))
    return float(((ahead - behind) / (2 * size)).norm().log())


def first_tangent(n: int) -> Tensor:
    """What a tracker of one exponent begins with when it does not align."""
    from lightning_nested.dynamics.game_tracker import GameTracker

    only = torch.zeros(n, dtype=DOUBLE, requires_grad=True)
    return GameTracker([(only,)], k=1).random_frame()[0]
