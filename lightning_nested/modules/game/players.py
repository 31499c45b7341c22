"""The players of a running game: who owns which parameters and which optimizer, and their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from operator import is_
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nested.linalg.processes import average_gradients
from lightning_nested.linalg.vectors import Reduce, Vector, norm
from lightning_nested.modules.game.loop import GameLoop
from lightning_nested.optim.step_dynamics import trainable


@dataclass(frozen=True, kw_only=True, eq=False)
class Player:
    """One player of a running game.

    Attributes:
        name: As in ``players()``.
        optimizer: Lightning's wrapper; ``optimizer.optimizer`` is the user's.
        parameters: What the optimizer trains.
        clip: Limit of the gradient; None: none.
        clip_algorithm: Whether it limits the norm of the player's gradient or each entry.
    """

    name: str
    optimizer: LightningOptimizer
    parameters: Vector
    clip: float | None = None
    clip_algorithm: str = "norm"

    @property
    def num_gradients(self) -> int:
        """Joint gradients that one update needs: 2 for ``Extragradient``."""
        return int(getattr(self.optimizer.optimizer, "num_gradients", 1))

    def is_finite(self, loss: Tensor, gradient: Sequence[Tensor | None]) -> bool:
        """Whether the loss and every entry of the gradient are finite."""
        # One number stands for all entries: a sum of squares is finite iff each term is, short of an overflow
        # that would be an explosion itself.
        return bool(torch.isfinite(loss + norm(tuple(g for g in gradient if g is not None))))

    @property
    def is_current(self) -> bool:
        """Whether ``parameters`` still is what the optimizer trains: not after freezing or unfreezing."""
        now = trainable(self.optimizer.optimizer)
        return len(now) == len(self.parameters) and all(map(is_, now, self.parameters))

    def set_gradient(self, gradient: Sequence[Tensor | None]) -> None:
        """Clip the gradient and hand it to the parameters, as tensors that may be changed in place."""
        seen: set[int] = set()
        for parameter, g in zip(self.parameters, self._clipped(gradient), strict=True):
            # Autograd may answer with one tensor for two parameters, or with an expanded number.
            if g is not None and g.layout is torch.strided:
                memory = g.untyped_storage().data_ptr()
                if memory in seen or g.stride() != parameter.stride():
                    g = torch.empty_like(parameter).copy_(g)
                seen.add(memory)
            parameter.grad = g

    def extrapolate(self) -> None:
        """Move to where the second gradient is taken."""
        optimizer: Any = self.optimizer.optimizer
        optimizer.extrapolate()

    def retreat(self) -> None:
        """Return from an extrapolated point as if the step had never begun."""
        if getattr(self.optimizer.optimizer, "is_extrapolated", False):
            self.clear_gradient()  # what has no gradient goes back to where it was
            self.optimizer.optimizer.step()

    def clear_gradient(self) -> None:
        """Let go of the gradient's memory."""
        for parameter in self.parameters:
            parameter.grad = None

    def _clipped(self, gradient: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        if self.clip is None:
            return gradient
        if self.clip_algorithm == "value":
            return [None if g is None else g.clamp(-self.clip, self.clip) for g in gradient]
        size = norm(tuple(g for g in gradient if g is not None))
        factor = (self.clip / (size + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        return [None if g is None else g * factor.to(g.dtype) for g in gradient]


def check_trainable(name: str, module: nn.Module) -> None:
    """Refuse a player that has nothing to train.

    Raises:
        MisconfigurationException: No parameters, or all of them frozen.
    """
    if not any(p.requires_grad for p in module.parameters()):
        frozen = any(True for _ in module.parameters())
        raise MisconfigurationException(
            f"Each player must have parameters to train. Got {name!r} "
            f"{'with all of them frozen' if frozen else 'without parameters'}; "
            f"{'unfreeze some' if frozen else 'give it some'}, or leave it out of players()."
        )


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer that wants to evaluate the loss itself, as LBFGS does.

    Raises:
        MisconfigurationException: Its ``step`` cannot do without a closure.
    """
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise MisconfigurationException(
            "An optimizer must take its step from finished gradients: a game has no one loss that a closure could "
            f"evaluate again. Got {type(optimizer).__name__}, whose step() needs a closure; use one that works "
            "without, such as Adam, ComplexAdam, or Extragradient for a second look."
        )


def match_players(
    modules: Mapping[str, nn.Module],
    optimizers: Sequence[LightningOptimizer],
    names: Mapping[int, str],
    loop: GameLoop,
) -> dict[str, Player]:
    """The players with the optimizer that holds their parameters, in the order of ``modules``.

    Args:
        modules: The module of each player.
        optimizers: In any order.
        names: Dotted names of all parameters by ``id``, for error messages.
        loop: Clipping.

    Raises:
        MisconfigurationException: A parameter that is trained or held by an optimizer belongs to two players,
            an optimizer to several or none, a player has not exactly one optimizer, or is wholly frozen.
    """
    in_optimizers = {id(p) for o in optimizers for group in o.optimizer.param_groups for p in group["params"]}
    owner: dict[int, str] = {}
    for player, module in modules.items():
        check_trainable(player, module)
        for parameter in module.parameters():
            if not parameter.requires_grad and id(parameter) not in in_optimizers:
                continue  # a frozen part, which players may share
            other = owner.setdefault(id(parameter), player)
            if other != player:
                raise MisconfigurationException(
                    "Players must not share parameters: each follows its own loss. "
                    f"Got {names.get(id(parameter))!r} in both {other!r} and {player!r}; give one a copy, or "
                    "make the shared part a player of its own."
                )
    found: dict[str, Player] = {}
    for optimizer in optimizers:
        check_optimizer(optimizer.optimizer)
        held = tuple(trainable(optimizer.optimizer))
        owners = sorted({owner.get(id(p), "no player") for p in held})
        if len(owners) != 1 or owners[0] == "no player":
            raise MisconfigurationException(
                "Each optimizer must hold parameters of exactly one player. "
                f"Got a {type(optimizer.optimizer).__name__} with parameters of {owners or 'nobody'}; the "
                f"players are {list(modules)}."
            )
        (name,) = owners
        if name in found:
            raise MisconfigurationException(
                f"Each player must have one optimizer. Got two for {name!r}; use parameter groups of one."
            )
        found[name] = Player(
            name=name,
            optimizer=optimizer,
            parameters=held,
            clip=loop.clip_of(name),
            clip_algorithm=loop.gradient_clip_algorithm,
        )
    without = [name for name in modules if name not in found]
    if without:
        raise MisconfigurationException(
            f"Each player must have an optimizer. Got none for {without}; give optimizers={{{without[0]!r}: ...}}, "
            "or return one for each player from configure_optimizers."
        )
    return {name: found[name] for name in modules}


def check_players(where: str, players: object) -> dict[str, nn.Module]:
    """The players, if they are modules by name.

    Raises:
        MisconfigurationException: Something else, or none.
    """
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


def check_losses(where: str, names: Sequence[str], losses: object) -> Mapping[str, Any]:
    """The losses, if there is one for each of the players that step."""
    if not isinstance(losses, Mapping):
        raise MisconfigurationException(
            f"{where}.player_losses must return a dictionary from names to losses. Got a {type(losses).__name__}."
        )
    lacking = [name for name in names if name not in losses]
    if lacking:
        raise MisconfigurationException(
            f"{where}.player_losses must return a loss for each of {list(names)}. "
            f"Got {list(losses)}, without {lacking}."
        )
    return losses


def check_player_loss(where: str, name: str, loss: object) -> Tensor:
    """The loss, if it is a scalar with its graph."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise MisconfigurationException(
            f"{where} must return a scalar tensor for {name!r}. Got {got}; return the mean loss."
        )
    if not loss.requires_grad:
        raise MisconfigurationException(
            f"{where} must return a tensor with its graph for {name!r}. Got one that does not require "
            "gradients: remove torch.no_grad() and .detach() from the path to the player's parameters."
        )
    return loss.reshape(())


def player_gradients(
    where: str, players: Sequence[Player], losses: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """Each player's loss, and its gradient with respect to that player's parameters alone.

    Nothing is accumulated into ``.grad`` and no hook of ``DistributedDataParallel`` fires.

    Raises:
        MisconfigurationException: A loss does not depend on its player's parameters.
    """
    gradients: list[list[Tensor | None]] = []
    for k, (player, loss) in enumerate(zip(players, losses, strict=True)):
        # Losses may share a graph; the last one frees its memory on the way.
        retain = k + 1 < len(losses)
        gradient = torch.autograd.grad(loss, player.parameters, retain_graph=retain, allow_unused=True)
        if all(g is None for g in gradient):
            raise MisconfigurationException(
                f"The loss of {player.name!r} must depend on its parameters. Got one from {where} that depends "
                "on none of them; check that its path is not detached and that names are not exchanged."
            )
        gradients.append(list(gradient))
    return [loss.detach() for loss in losses], gradients


class GradientSums:
    """Losses and gradients of one step of the schedule, summed over its batches.

    Attributes:
        count: Batches so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._losses: list[Tensor] = []
        self._gradients: list[list[Tensor | None]] = []

    def add(self, losses: list[Tensor], gradients: list[list[Tensor | None]]) -> None:
        """Another batch."""
        self.count += 1
        if self.count == 1:
            self._losses, self._gradients = losses, gradients
            return
        self._losses = [a + b for a, b in zip(self._losses, losses, strict=True)]
        self._gradients = [
            [b if a is None else a if b is None else a + b for a, b in zip(mine, new, strict=True)]
            for mine, new in zip(self._gradients, gradients, strict=True)
        ]

    def take(
        self, players: Sequence[Player], reduce: Reduce | None
    ) -> tuple[list[Tensor], list[list[Tensor | None]]]:
        """Means over batches and processes, in one message; begins anew."""
        losses, gradients, count = self._losses, self._gradients, self.count
        self.clear()
        if count > 1:
            losses = [loss / count for loss in losses]
            gradients = [[None if g is None else g / count for g in each] for each in gradients]
        return _averaged(players, losses, gradients, reduce)

    def clear(self) -> None:
        """Forget the batches so far."""
        self.count, self._losses, self._gradients = 0, [], []

    def state_dict(self, players: Sequence[Player], reduce: Reduce | None) -> dict[str, Any]:
        """The open sums, as every process may continue them."""
        losses, gradients = _averaged(players, self._losses, self._gradients, reduce)
        return {"count": self.count, "losses": losses, "gradients": gradients}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue saved sums."""
        self.count = state["count"]
        self._losses = [loss.to(device) for loss in state["losses"]]
        self._gradients = [[None if g is None else g.to(device) for g in each] for each in state["gradients"]]


def _averaged(
    players: Sequence[Player],
    losses: list[Tensor],
    gradients: list[list[Tensor | None]],
    reduce: Reduce | None,
) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """Means over processes, of losses and gradients in one message."""
    if reduce is None or not losses:
        return losses, gradients
    like = [p for player in players for p in player.parameters] + losses
    with torch.no_grad():
        sent: list[Tensor | None] = [*(g for each in gradients for g in each), *losses]
        means = iter(average_gradients(sent, like, reduce))
        averaged = [[next(means) for _ in each] for each in gradients]
    return [loss for loss in means if loss is not None], averaged
