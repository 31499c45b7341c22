"""Follows a running GameModule: every player's loss once more, with its graph to all players and without trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.dynamics.game_tracker import GameTracker
from lightning_nested.dynamics.tangents import Clip
from lightning_nested.networks.spectral_norm import spectral_norm_layers
from lightning_nested.optim.registry import known_rule
from lightning_nested.optim.step_dynamics import step_dynamics
from lightning_nested.optim.update_rules import UpdateRule
from lightning_nested.trainer.fixed_batches import FixedBatches
from lightning_nested.trainer.isolation import without_trace
from lightning_nested.trainer.lightning import reduction
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.stand_ins import StandIns


class GameFollower:
    """The tangents of all players of a running game, by the module's own ``player_losses``.

    Whenever the game asks for losses to step on, they are evaluated before, at the same point, on the same batch and
    random numbers and in the same mode, but with their graph to every player. Players may step together or in turns,
    several times in a round, or look ahead.

    Args:
        trainer: Of the run.
        module: A GameModule whose players have their optimizers.
        fixed: Batches that are kept; None: those of the run.
        rule: A re-statement of an optimizer that is not known.
        **options: Of :class:`GameTracker`.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: Any,
        *,
        fixed: FixedBatches | None,
        rule: UpdateRule | None,
        **options: Any,
    ) -> None:
        self.trainer, self.module, self.rule, self.fixed = trainer, module, rule, fixed
        players = module.running_players
        if rule is None:
            for player in players.values():
                for group in player.optimizer.optimizer.param_groups:
                    known_rule(player.optimizer.optimizer, group)  # raises for one that is not known
        self.names = list(players)
        self.tracker = GameTracker(
            [player.parameters for player in players.values()], reduce=reduction(trainer), **options
        )
        self.open = False  # whether the present batch belongs to a round that is followed
        self.call = 0  # of player_losses in this round
        self._told: set[str] = set()  # players whose losses were looked at
        self._original: Callable[..., Any] = module.player_losses
        self._stand_ins = StandIns()
        self._stand_ins.put(module, "player_losses", self._player_losses)

    def put_back(self) -> None:
        """The module's own method again."""
        self._stand_ins.put_back()

    def advance(self, optimizer: Optimizer) -> None:
        """Before an optimizer's step."""
        if not self.open or self.tracker.frame is None:
            return
        for index, player in enumerate(self.module.running_players.values()):
            if player.optimizer.optimizer is optimizer and self.tracker.has_observed(index):
                self.tracker.advance(index, optimizer, self.rule, clip=_clip(player))

    def end_round(self) -> bool:
        """After a complete round; whether a window ended."""
        self.call = 0
        return self.tracker.end_step()

    # ---- inside

    def _player_losses(self, names: Sequence[str], batch: Any) -> Any:
        """In place of the module's own: observe, then let it go on."""
        if self.open and not self.module.joint_graph and torch.is_grad_enabled():
            self._match_players()
            self._look_ahead(names)
            self._observe(list(names), batch)
        return self._original(names, batch)

    def _match_players(self) -> None:
        """Tangents begin anew where somebody was frozen or unfrozen."""
        now = [player.parameters for player in self.module.running_players.values()]
        held = self.tracker.players
        if any(
            len(a) != len(b) or any(p is not q for p, q in zip(a, b, strict=True))
            for a, b in zip(now, held, strict=True)
        ):
            self.tracker.follow_players(now)

    def _look_ahead(self, names: Sequence[str]) -> None:
        """Tangents follow players who were extrapolated since their last losses."""
        for name in names:
            player = self.module.running_players[name]
            optimizer = player.optimizer.optimizer
            if getattr(optimizer, "is_extrapolated", False):
                self.tracker.advance(
                    self.names.index(name), optimizer, self.rule, clip=_clip(player), ahead=True
                )

    def _observe(self, names: list[str], batch: Any) -> None:
        if self.tracker.frame is None and self.tracker.align:
            losses = self._evaluate(self.names, batch)
            dynamics = [
                step_dynamics(player.optimizer.optimizer, player.parameters)
                for player in self.module.running_players.values()
            ]
            with torch.autocast(self.module.device.type, enabled=False):
                self.tracker.align_to(
                    [loss * each.sign for loss, each in zip(losses, dynamics, strict=True)],
                    tuple(d for each in dynamics for d in each.scale),
                )
        losses = self._evaluate(names, batch)
        if not self._told.issuperset(names):
            self._told.update(names)
            self._warn_if_detached(names, losses)
        self.call += 1
        with torch.autocast(self.module.device.type, enabled=False):
            self.tracker.observe(
                {self.names.index(name): loss for name, loss in zip(names, losses, strict=True)}
            )

    def _evaluate(self, names: list[str], batch: Any) -> list[Tensor]:
        """Losses of the players, as the game would find them now."""
        module, device = self.module, self.module.device
        cache, together = dict(module.step_cache), module.batch_players
        if self.fixed is None:
            stream = RandomStream.snapshot(device)
        else:
            batch, stream = self.fixed.get(self.call, batch)
            cache = {}
        with ExitStack() as stack:
            for context in (
                stream.replay(),
                without_trace(module, self.trainer),
                module.joint_evaluation(names),
                torch.enable_grad(),
            ):
                stack.enter_context(context)
            module.step_cache = cache  # what players share, such as fakes, is a part of the function
            if len(names) < len(together):
                module.batch_players = together
            if hasattr(
                module, "one_function"
            ):  # it freezes spectral vectors, which the step will have improved
                for layer in spectral_norm_layers(module).values():
                    if layer.training:
                        layer.iterate()
            found = self._original(names, batch)
        return [found[name].reshape(()) for name in names]

    def _warn_if_detached(self, names: list[str], losses: list[Tensor]) -> None:
        for name, loss in zip(names, losses, strict=True):
            for other, held in zip(self.names, self.tracker.players, strict=True):
                found = torch.autograd.grad(loss, held, retain_graph=True, allow_unused=True)
                if all(g is None for g in found):
                    rank_zero_warn(
                        f"The loss of {name!r} has no graph to the parameters of {other!r}. If it depends on them, "
                        "the exponents lack that coupling: in player_loss, do not detach and do not use "
                        "torch.no_grad() where self.joint_graph is True."
                    )


def _clip(player: Any) -> Clip | None:
    return None if player.clip is None else Clip(limit=player.clip, algorithm=player.clip_algorithm)
