"""Tangents of a running game, from a second evaluation of each player's loss with its graph to all players."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nested.dynamics.game_tracker import GameTracker
from lightning_nested.dynamics.tangents import Clip
from lightning_nested.linalg.vectors import Vector
from lightning_nested.networks.spectral_norm import iterate_spectral_norms
from lightning_nested.optim.step_dynamics import step_dynamics
from lightning_nested.optim.update_rules import UpdateRule
from lightning_nested.trainer.follower import GRADIENT_HOOKS, Follower, has_gradient_hooks
from lightning_nested.trainer.joint_losses import joint_losses, warn_if_detached
from lightning_nested.trainer.lightning import reduction
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.stand_ins import StandIns


class GameFollower(Follower):
    """Follows all players of a running game, by the ``player_losses`` of its module.

    Whenever the game asks for losses to step on, they are evaluated before, at the same point, on the same batch and
    random numbers and in the same mode, but with their graph to every player. Players may step together or in turns,
    several times in a round, or look ahead. A step is a round, a game update.
    """

    unit = "game update"
    tracker: GameTracker

    def __init__(
        self, trainer: Trainer, module: Any, *, fixed: bool, rule: UpdateRule | None, **options: Any
    ) -> None:
        optimizers = [player.optimizer.optimizer for player in module.running_players.values()]
        # all parameters: frozen ones may be trained later
        super().__init__(trainer, module, optimizers, module.parameters(), fixed=fixed, rule=rule)
        self.names = list(module.running_players)
        self.tracker = GameTracker(self._parameters(), reduce=reduction(trainer), **options)
        self._losses = _FollowedLosses.of(module)
        self._losses.followers.append(self)

    def _parameters(self) -> list[Vector]:
        return [player.parameters for player in self.module.running_players.values()]

    @override
    def begin_batch(self, batch: Any) -> None:
        self.steps = self.module.game_updates

    @override
    def observe(self, loss: Tensor) -> None:
        """Do nothing: losses were observed where the game computed them."""

    @override
    def advance(self, optimizer: Optimizer) -> bool:
        if self.is_open and self.tracker.frame is not None:
            for index, player in enumerate(self.module.running_players.values()):
                if player.optimizer.optimizer is optimizer and self.tracker.has_observed(index):
                    self.tracker.advance(index, optimizer, self.rule, clip=_clip(player))
        return False

    @override
    def end_batch(self) -> bool:
        followed, self.is_open = self.is_open, False
        if not followed or self.module.game_updates == self.steps:
            return False
        self.call = 0
        return self.tracker.end_step()

    @override
    def logged_steps(self) -> int:
        return self.steps

    @override
    def log(self, metrics: dict[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.steps + 1)  # by game updates, not optimizer steps

    @override
    def put_back(self) -> None:
        self._losses.remove(self)

    def follow_losses(self, names: list[str], batch: Any) -> None:
        """Observe the losses of these players, which the game is about to compute and step on."""
        if not self.is_open or self.module.joint_graph or not torch.is_grad_enabled():
            return
        players = self._parameters()
        if any(map(has_gradient_hooks, players)):
            self.stop(GRADIENT_HOOKS)
            return
        with self.stopping():
            if not self.tracker.holds(p for held in players for p in held):
                self.tracker.follow_players(players)
            self.resume_tangents()
            self._look_ahead(names)
            self._observe(names, batch)

    def _look_ahead(self, names: Sequence[str]) -> None:
        """Push tangents to the points that players extrapolated to since their last losses."""
        for name in names:
            player = self.module.running_players[name]
            optimizer = player.optimizer.optimizer
            if getattr(optimizer, "is_extrapolated", False):
                index = self.names.index(name)
                self.tracker.advance(index, optimizer, self.rule, clip=_clip(player), ahead=True)

    def _observe(self, names: list[str], batch: Any) -> None:
        if self.tracker.frame is None:
            losses = self._evaluate(self.names, batch)
            warn_if_detached(self.names, losses, self.tracker.players)
            if self.tracker.align:
                self._align(losses)
        losses = self._evaluate(names, batch)
        self.call += 1
        with torch.autocast(self.module.device.type, enabled=False):
            self.tracker.observe(dict(zip(map(self.names.index, names), losses, strict=True)))

    def _align(self, losses: list[Tensor]) -> None:
        players = self.module.running_players.values()
        dynamics = [step_dynamics(player.optimizer.optimizer, player.parameters) for player in players]
        descended = [loss * each.sign for loss, each in zip(losses, dynamics, strict=True)]
        with torch.autocast(self.module.device.type, enabled=False):
            self.tracker.align_to(descended, tuple(d for each in dynamics for d in each.scale))

    def _evaluate(self, names: list[str], batch: Any) -> list[Tensor]:
        """Return the losses of these players as the game would find them now, without side effects."""
        module = self.module
        cache, together = dict(module.step_cache), module.batch_players
        if self.fixed is None:
            stream = RandomStream.snapshot(module.device)
        else:
            batch, stream = self.fixed.get(self.call, batch)
            cache = {}

        def as_in_step() -> None:
            module.step_cache = cache  # what players share, such as fakes, is a part of the function
            if len(names) < len(together):
                module.batch_players = together
            # one_function freezes spectral vectors, which the step will have improved
            if hasattr(module, "one_function"):
                iterate_spectral_norms(module, of_training_only=True)

        return joint_losses(module, names, batch, stream, prepare=as_in_step)


class _FollowedLosses:
    """Replacement of a module's ``player_losses`` that lets followers see each call first; they share one."""

    def __init__(self, module: Any) -> None:
        self.original: Callable[..., Any] = module.player_losses
        self.followers: list[GameFollower] = []
        self._stand_ins = StandIns()
        self._stand_ins.put(module, "player_losses", self)

    @classmethod
    def of(cls, module: Any) -> _FollowedLosses:
        """Return the replacement that the module has already, or replace now."""
        found = vars(module).get("player_losses")
        return found if isinstance(found, cls) else cls(module)

    def __call__(self, names: Sequence[str], batch: Any) -> Any:
        for follower in self.followers:
            follower.follow_losses(list(names), batch)
        return self.original(names, batch)

    def remove(self, follower: GameFollower) -> None:
        """Forget a follower, whatever the order; the last one restores the module."""
        if follower in self.followers:
            self.followers.remove(follower)
        if not self.followers:
            self._stand_ins.put_back()


def _clip(player: Any) -> Clip | None:
    return None if player.clip is None else Clip(limit=player.clip, algorithm=player.clip_algorithm)
