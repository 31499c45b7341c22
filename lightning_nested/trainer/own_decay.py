"""The weight decay of a decoupled optimizer, which gives way to tuned ones for a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_nested.optim.step_dynamics import decoupled_rates


class OwnDecay:
    """Keeps what the groups of one optimizer decayed by."""

    def __init__(self) -> None:
        self._optimizer: Optimizer | None = None
        self._of_groups: list[float] = []

    @property
    def taken(self) -> bool:
        """True if the optimizer's own decay gives way."""
        return bool(self._of_groups)

    def take(self, optimizer: Optimizer) -> None:
        """Let it give way, if it is decoupled; again once a checkpoint has restored it, or a group was added."""
        rates = decoupled_rates(optimizer)
        if not rates:
            return
        own = [group["weight_decay"] for group in optimizer.param_groups]
        decoupled = [any(id(p) in rates for p in group["params"]) for group in optimizer.param_groups]
        known = len(self._of_groups)
        # Those that gave way are at zero, unless a checkpoint has restored them.
        restored = any(decay for decay, gave_way in zip(own[:known], decoupled, strict=False) if gave_way)
        self._optimizer = optimizer
        self._of_groups = own if restored else [*self._of_groups, *own[known:]]
        for group, gives_way in zip(optimizer.param_groups, decoupled, strict=True):
            if gives_way:
                group["weight_decay"] = 0.0

    def give_back(self) -> None:
        """Give the optimizer its own decay back."""
        if self._optimizer is not None:
            self._return_to(self._optimizer.param_groups)
        self._optimizer, self._of_groups = None, []

    def give_back_saved(self, checkpoint: Mapping[str, Any]) -> None:
        """Save the optimizer's own decay, not that it gives way: a run without tuned ones may go on from there."""
        for state in checkpoint.get("optimizer_states", []):
            self._return_to(state["param_groups"])

    def _return_to(self, groups: Sequence[dict[str, Any]]) -> None:
        # Groups that were added since have theirs.
        for group, decay in zip(groups, self._of_groups, strict=False):
            group["weight_decay"] = decay
