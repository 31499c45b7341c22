"""Refuse players, losses and optimizers that are no game, each error with its cure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_nested.trainer.inner_problem import check_loss


def check_players(where: str, players: object) -> dict[str, nn.Module]:
    """Return the players if they are modules by name, and at least one."""
    if not isinstance(players, Mapping):
        raise MisconfigurationException(
            f"{where}.players() must return a dictionary from names to modules. "
            f"Got a {type(players).__name__}; return {{'name': module, ...}}."
        )
    if not players:
        raise MisconfigurationException(f"{where}.players() must name at least one player. Got none.")
    for name, module in players.items():
        if not isinstance(name, str) or not isinstance(module, nn.Module):
            raise MisconfigurationException(
                f"{where}.players() must return a dictionary from names to modules. "
                f"Got {name!r}: {type(module).__name__}; wrap what a player trains in an nn.Module."
            )
    return dict(players)


def check_names(what: str, given: Iterable[str], players: Mapping[str, nn.Module]) -> None:
    """Refuse names of other things than players."""
    unknown = [name for name in given if name not in players]
    if unknown:
        raise MisconfigurationException(
            f"{what} must name players. Got {unknown}; the players are {list(players)}."
        )


def check_factories(what: str, factory: object, by_player: object) -> None:
    """Refuse an optimizer or scheduler in place of the function that makes one."""
    if by_player is not None and not isinstance(by_player, Mapping):
        raise ValueError(
            f"{what}s must be a dictionary from players to functions. Got a {type(by_player).__name__}; use "
            f"{what}= for all players."
        )
    named = {what: factory, **{f"{what}s[{name!r}]": make for name, make in (by_player or {}).items()}}
    for name, make in named.items():
        if make is not None and not callable(make):
            cls, argument = type(make).__name__, "params" if what == "optimizer" else "optimizer"
            raise ValueError(
                f"{name} must be a function that makes one for each player: {argument} in, {what} out. "
                f"Got a finished {cls}; give lambda {argument}: {cls}({argument}, …)."
            )


def check_trainable(name: str, module: nn.Module) -> None:
    """Refuse a player without parameters, or with all of them frozen."""
    if not any(p.requires_grad for p in module.parameters()):
        frozen = any(True for _ in module.parameters())
        raise MisconfigurationException(
            f"Each player must have parameters to train. Got {name!r} "
            f"{'with all of them frozen' if frozen else 'without parameters'}; "
            f"{'unfreeze some' if frozen else 'give it some'}, or leave it out of players()."
        )


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer that evaluates the loss itself, as LBFGS does."""
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise MisconfigurationException(
            "An optimizer must take its step from finished gradients: a game has no one loss that a closure could "
            f"evaluate again. Got {type(optimizer).__name__}, whose step() needs a closure; use one that works "
            "without, such as Adam, ComplexAdam, or Extragradient for a second look."
        )


def check_monitors(schedulers: Iterable[Any]) -> None:
    """Refuse a plateau scheduler that does not know its metric."""
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau) and not getattr(scheduler, "monitor", None):
            raise MisconfigurationException(
                "ReduceLROnPlateau must know its metric. Got one without, and Lightning drops a scheduler's "
                "'monitor' key in manual optimization; use "
                "lightning.pytorch.cli.ReduceLROnPlateau(optimizer, monitor=...)."
            )


def check_losses(module: LightningModule, names: Sequence[str], losses: object) -> list[Tensor]:
    """Return the losses of these players, if each is a scalar with its graph."""
    where = f"{type(module).__name__}.player_losses"
    if not isinstance(losses, Mapping):
        raise MisconfigurationException(
            f"{where} must return a dictionary from names to losses. Got a {type(losses).__name__}."
        )
    lacking = [name for name in names if name not in losses]
    if lacking:
        raise MisconfigurationException(
            f"{where} must return a loss for each of {list(names)}. Got {list(losses)}, without {lacking}."
        )
    return [check_loss("player_loss", module, losses[name], player=name) for name in names]
