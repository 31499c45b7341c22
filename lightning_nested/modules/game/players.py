"""Players of a running game: their optimizers, parameters and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_nested.linalg.vectors import Vector, norm
from lightning_nested.modules.game.checks import check_names, check_optimizer, check_trainable
from lightning_nested.modules.game.loop import GameLoop, Slot
from lightning_nested.optim.step_dynamics import trainable


@dataclass(frozen=True, kw_only=True, eq=False)
class Player:
    """One player of a running game.

    Attributes:
        name: Name in ``players()``.
        optimizer: Lightning's wrapper; ``optimizer.optimizer`` is the user's.
        parameters: Parameters that the optimizer trains.
        clip: Limit of the gradient; None: none.
        clip_algorithm: ``"norm"`` limits the norm of the player's gradient, ``"value"`` each entry.
    """

    name: str
    optimizer: LightningOptimizer
    parameters: Vector
    clip: float | None = None
    clip_algorithm: str = "norm"

    @property
    def kind(self) -> str:
        """Name of the class of its optimizer."""
        return type(self.optimizer.optimizer).__name__

    @property
    def num_gradients(self) -> int:
        """Joint gradients that one update needs: 2 for ``Extragradient``."""
        return int(getattr(self.optimizer.optimizer, "num_gradients", 1))

    def is_finite(self, loss: Tensor, gradient: Sequence[Tensor | None]) -> bool:
        """Return True if the loss and every entry of the gradient are finite."""
        # One number stands for all entries: a sum of squares is finite iff each term is, short of an overflow
        # that would be an explosion itself.
        return bool(torch.isfinite(loss + norm(tuple(g for g in gradient if g is not None))))

    @property
    def is_current(self) -> bool:
        """False once parameters were frozen or unfrozen: ``parameters`` is not what the optimizer trains."""
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
        """Move to the point at which the second gradient is taken."""
        optimizer: Any = self.optimizer.optimizer
        optimizer.extrapolate()

    def retreat(self) -> None:
        """Return from an extrapolated point as if the step had never begun."""
        if getattr(self.optimizer.optimizer, "is_extrapolated", False):
            # A parameter without gradient goes back to where it was.
            self.clear_gradient()
            self.optimizer.optimizer.step()

    def clear_gradient(self) -> None:
        """Release the gradient's memory."""
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


def build_optimizers(
    players: Mapping[str, nn.Module],
    optimizers: Mapping[str, OptimizerCallable],
    optimizer: OptimizerCallable | None,
    schedulers: Mapping[str, LRSchedulerCallable | None],
    scheduler: LRSchedulerCallable | None,
) -> tuple[list[Optimizer], list[dict[str, Any]]]:
    """Return the optimizer of each player, and Lightning's configurations of the schedulers.

    Raises:
        MisconfigurationException: An unknown player, or one without optimizer or parameters to train.
    """
    check_names("optimizers", optimizers, players)
    check_names("schedulers", schedulers, players)
    made: list[Optimizer] = []
    configs: list[dict[str, Any]] = []
    for name, module in players.items():
        check_trainable(name, module)
        make = optimizers.get(name, optimizer)
        if make is None:
            raise MisconfigurationException(
                f"Each player must have an optimizer. Got none for {name!r}; give "
                f"optimizers={{{name!r}: <from parameters to optimizer>}}, optimizer= for all, or override "
                "configure_optimizers."
            )
        made.append(make(p for p in module.parameters() if p.requires_grad))
        if not isinstance(made[-1], Optimizer):
            raise MisconfigurationException(
                f"The optimizer's function must return one optimizer. Got a {type(made[-1]).__name__} for {name!r}; "
                "return the optimizer alone, and give scheduler= a function of its own."
            )
        make_scheduler = schedulers.get(name, scheduler)
        if make_scheduler is not None:
            found = make_scheduler(made[-1])
            # No "monitor" here: Lightning drops it in manual optimization.
            interval = "epoch" if isinstance(found, ReduceLROnPlateau) else "step"
            configs.append({"scheduler": found, "interval": interval, "name": f"lr-{name}"})
    return made, configs


def match_players(
    modules: Mapping[str, nn.Module],
    optimizers: Sequence[LightningOptimizer],
    names: Mapping[int, str],
    loop: GameLoop,
) -> dict[str, Player]:
    """Match the players with the optimizers that hold their parameters, in the order of ``modules``.

    Args:
        modules: Module of each player.
        optimizers: Optimizers in any order.
        names: Dotted names of all parameters by ``id``, for error messages.
        loop: Options of clipping.

    Raises:
        MisconfigurationException: A parameter that is trained or held by an optimizer belongs to two players,
            an optimizer to several or none, a player has not exactly one optimizer, or is wholly frozen.
    """
    clip = loop.gradient_clip_val
    check_names("gradient_clip_val", clip if isinstance(clip, dict) else {}, modules)
    owner = _owners(modules, optimizers, names)
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


def _owners(
    modules: Mapping[str, nn.Module], optimizers: Sequence[LightningOptimizer], names: Mapping[int, str]
) -> dict[int, str]:
    """Return the player of each parameter by ``id``, without frozen parts that no optimizer holds."""
    held = {id(p) for o in optimizers for group in o.optimizer.param_groups for p in group["params"]}
    owner: dict[int, str] = {}
    for player, module in modules.items():
        check_trainable(player, module)
        for parameter in module.parameters():
            if not parameter.requires_grad and id(parameter) not in held:
                continue  # players may share it
            other = owner.setdefault(id(parameter), player)
            if other != player:
                raise MisconfigurationException(
                    "Players must not share parameters: each follows its own loss. "
                    f"Got {names.get(id(parameter))!r} in both {other!r} and {player!r}; give one a copy, or "
                    "make the shared part a player of its own."
                )
    return owner


def check_gradient_counts(schedule: Iterable[Slot], players: Mapping[str, Player], batches: int) -> None:
    """Refuse players that step together on different numbers of gradients, or on two from accumulated batches."""
    for step in (step for slot in schedule for step in slot):
        needs = {name: players[name].num_gradients for name in step}
        if len(set(needs.values())) > 1:
            raise MisconfigurationException(
                "Players that step together must need equally many gradients. Got "
                f"{needs}; give all of them Extragradient or none, or use update='alternating'."
            )
        if max(needs.values()) > 1 and batches > 1:
            raise MisconfigurationException(
                "An optimizer that needs two gradients from one batch cannot accumulate over several. Got "
                f"accumulate_grad_batches={batches}; set it to 1."
            )


def check_restored(players: Iterable[Player], saved: Mapping[str, str]) -> None:
    """Refuse the state of an optimizer of another class, which lacks options that a step reads.

    Args:
        players: Players whose optimizers have their saved states.
        saved: Classes of those that were saved, by player; older checkpoints have none.
    """
    for player in players:
        if saved.get(player.name) in (None, player.kind):
            continue
        optimizer = player.optimizer.optimizer
        lacking = [key for key in optimizer.defaults for group in optimizer.param_groups if key not in group]
        if lacking:
            raise MisconfigurationException(
                "A player must resume with an optimizer of the class that was saved. Got "
                f"{player.kind} for {player.name!r}, whose saved {saved[player.name]} has no "
                f"{', '.join(dict.fromkeys(lacking))}; take that class, or start without the checkpoint."
            )
