"""Attributes of a module through which its training loss reads hyperparameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_nested.hyperparameters import Hyperparameter, OuterStep
from lightning_nested.trainer.stand_ins import StandIns
from lightning_nested.trainer.use import Use


def bind_hyperparameters(module: nn.Module, hyperparameters: Iterable[Hyperparameter]) -> None:
    """Set each hyperparameter that a loss reads as an attribute of one of our modules.

    Raises:
        ValueError: The module has that attribute already.
    """
    for hyperparameter in hyperparameters:
        name = hyperparameter.attribute
        if name is None:
            continue
        if getattr(module, name, None) not in (None, hyperparameter):
            raise ValueError(
                f"{type(hyperparameter).__name__} becomes the attribute {name!r}. Got a "
                f"{type(module).__name__} that has it already; set another name=."
            )
        setattr(module, name, hyperparameter)


def load_bound(hyperparameters: Iterable[Hyperparameter], state: Mapping[str, Any] | None) -> None:
    """Give hyperparameters that a loss reads their values in the state of an outer loop, for a module without a fit."""
    saved = {} if state is None else state["outer"]["hyperparameters"]
    for hyperparameter in hyperparameters:
        if hyperparameter.attribute is not None and hyperparameter.name in saved and not hyperparameter.built:
            hyperparameter.build({})
            hyperparameter.load_state_dict(saved[hyperparameter.name])


def attach_hyperparameters(module: nn.Module, hyperparameters: Iterable[Hyperparameter], use: Use) -> None:
    """Let hyperparameters find tensors of the module; what that changes of them is undone when the use ends."""
    for hyperparameter in hyperparameters:
        use.at_end(hyperparameter.detach_module)
        hyperparameter.attach_module(module)


def replace_placeholders(
    module: nn.Module, hyperparameters: Iterable[Hyperparameter], replaced: StandIns, *, complete: bool = True
) -> None:
    """Replace attributes of a user's module, which are None in untuned runs, until ``replaced.put_back()``.

    A module that is not ``complete``, before its own ``setup`` and ``configure_model``, may still lack one.

    Raises:
        MisconfigurationException: The module lacks the attribute, or has another value there.
    """
    for hyperparameter in hyperparameters:
        name, kind, module_name = (
            hyperparameter.attribute,
            type(hyperparameter).__name__,
            type(module).__name__,
        )
        if name is None:
            continue
        if not hasattr(module, name):
            if not complete:
                continue
            raise MisconfigurationException(
                f"{kind} is read by the training loss through the attribute {name!r}. "
                f"Got {module_name} without it; add:\n{hyperparameter.shown_usage()}"
            )
        found = getattr(module, name)
        if found is hyperparameter:
            continue
        if found is not None:
            raise MisconfigurationException(
                f"{kind} replaces the attribute {name!r}, which must be None. "
                f"Got a {type(found).__name__} in {module_name}; set another name=."
            )
        replaced.put(module, name, hyperparameter)


def take_out(optimizer: Optimizer, outer: OuterStep) -> None:
    """Remove hyperparameters that are the module's own tensors from the inner optimizer."""
    tuned = {id(t): h.name for h in outer.hyperparameters for t in h.tensors.values()}
    removed = [p for group in optimizer.param_groups for p in group["params"] if id(p) in tuned]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in tuned]
    for tensor in removed:
        optimizer.state.pop(tensor, None)
    if removed:
        names = dict.fromkeys(tuned[id(p)] for p in removed)
        rank_zero_info(
            f"HypergradientCallback tunes {', '.join(names)} by the outer loss and took {len(removed)} tensor(s) out "
            "of the inner optimizer."
        )
