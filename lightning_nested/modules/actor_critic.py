"""Reinforcement learning as a game of a policy and a critic."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution
from torch.nn import functional
from typing_extensions import override

from lightning_nested.arguments import at_least, check, within
from lightning_nested.games.experience import Rollout, generalized_advantages
from lightning_nested.linalg.processes import of_all_processes
from lightning_nested.modules.game.loop import GameLoop
from lightning_nested.modules.game.module import GameModule


class ActorCritic(GameModule):
    """Advantage actor-critic: a policy π follows what a critic V says of its actions; on :class:`ExperienceDataModule`.

    A game of two players, on one rollout of the current policy:

        actor:   −mean log π(a|s) Â(s, a) − c · mean H(π(·|s))
        critic:   mean (V(s) − R)²,  R = Â(s, a) + V(s) held fixed

    with advantages Â from :func:`~lightning_nested.games.generalized_advantages`, for the actor shifted and scaled to
    mean 0 and deviation 1. Both step on each batch, the actor first. Logged beside the losses: ``mean_return`` of the
    last 100 episodes, of all processes. Callbacks may monitor it after every update, and checkpoints keep it.

        ActorCritic(actor=MLP(4, num_classes=2), critic=MLP(4, num_classes=1), optimizer=lambda p: Adam(p, lr=1e-3))

    The policy is over numbered actions, with the actor's outputs as logits. For continuous actions override ``policy``:

        def policy(self, observations):
            return Independent(Normal(self.actor(observations), self.actor.log_std.exp()), 1)

    The game's Jacobian, as :class:`GameSpectrumCallback` measures it, has the critic's influence on the actor, but not
    the actor's on the critic: that goes through experience, which has no graph. Its spectrum shows no rotation.

    Mnih et al. (2016), ICML, PMLR 48:1928-1937; Sutton, McAllester, Singh & Mansour (2000), NeurIPS 12.

    Args:
        actor: Network from observations (m, ...) to logits (m, actions).
        critic: Network from observations (m, ...) to values (m, 1).
        entropy: c.
        discount: γ of rewards.
        trace: λ of the advantages.
        loop: Accumulation and clipping; None: neither. Both step on each rollout, whatever ``reuse_batch`` says;
            with accumulation in alternating updates each has rollouts of its own.
        **game: Arguments of :class:`GameModule`.

    Raises:
        ValueError: A discount or trace outside [0, 1], or a negative entropy.
        MisconfigurationException: In ``fit``: a batch that is no rollout; a critic without one number for each
            observation, or a policy without one ``log_prob`` for each action.
    """

    def __init__(
        self,
        actor: nn.Module,
        critic: nn.Module,
        *,
        entropy: float = 0.01,
        discount: float = 0.99,
        trace: float = 0.95,
        loop: GameLoop | None = None,
        **game: Any,
    ) -> None:
        check(ActorCritic.__init__, locals())
        at_least(0, entropy=entropy)
        within(0, 1, discount=discount, trace=trace)
        loop = loop or GameLoop()
        super().__init__(loop=replace(loop, reuse_batch=loop.accumulate_grad_batches == 1), **game)
        self.actor, self.critic = actor, critic
        self.entropy, self.discount, self.trace = entropy, discount, trace
        self._returns: deque[float] = deque(maxlen=100)

    def policy(self, observations: Tensor) -> Distribution:
        """Return the distribution of actions after observations (m, ...), with a ``log_prob`` of shape (m,)."""
        return Categorical(logits=self.actor(observations))

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        """Draw an action for each observation."""
        actions: Tensor = self.policy(observations).sample()
        return actions

    def mean_return(self) -> float | None:
        """Return the mean sum of rewards of the last 100 episodes of training; None before the first has ended."""
        return sum(self._returns) / len(self._returns) if self._returns else None

    @override
    def players(self) -> dict[str, nn.Module]:
        return {"actor": self.actor, "critic": self.critic}

    @override
    def player_loss(self, name: str, batch: Any) -> Tensor:
        seen = batch["observations"]
        try:
            found = self.critic(seen.flatten(0, 1))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            # What ran once has the right sizes.
            if self.game_updates:
                raise
            raise MisconfigurationException(
                f"The critic must take observations of shape (batch, {', '.join(map(str, seen.shape[2:]))}). Got "
                f"{type(error).__name__}: {error}; give it the environment's sizes, as the actor has."
            ) from error
        values = _one_each("critic", found, seen.shape[:2])
        # The critic's targets never have a graph, the actor's advantages for the game's Jacobian alone.
        fixed = values if name == "actor" and self.joint_graph else values.detach()
        advantages = generalized_advantages(
            batch["rewards"],
            fixed,
            batch["terminated"],
            batch["ended"],
            discount=self.discount,
            trace=self.trace,
        )
        valid = batch["counts"]
        if name == "critic":
            return functional.mse_loss(values[:-1][valid], (advantages + fixed[:-1])[valid])
        policy, advantage = self.policy(batch["observations"][:-1][valid]), advantages[valid]
        scaled = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        chosen = _one_each("log_prob of the policy", policy.log_prob(batch["actions"][valid]), scaled.shape)
        loss = -(chosen * scaled).mean()
        # Not every distribution knows its entropy.
        return loss - self.entropy * policy.entropy().mean() if self.entropy else loss

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, dict) or not Rollout.__required_keys__ <= batch.keys():
            got = list(batch) if isinstance(batch, dict) else type(batch).__name__
            raise MisconfigurationException(
                f"A batch of ActorCritic must be a Rollout. Got {got}; use ExperienceDataModule."
            )
        # Of all processes, so that all have the mean or lack it together: a checkpoint's monitor waits for all.
        self._returns.extend(chain.from_iterable(of_all_processes(batch["returns"].tolist())))
        # Not by game_metrics alone, which loggers get now and then: callbacks monitor it at any update.
        self.trainer.callback_metrics.update(
            {name: torch.tensor(value, device=self.device) for name, value in self.game_metrics().items()}
        )

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.game_updates == 0:
            self._returns.clear()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if "game" in checkpoint:
            checkpoint["game"]["returns"] = list(self._returns)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._returns.clear()
        self._returns.extend(checkpoint.get("game", {}).get("returns", ()))

    @override
    def game_metrics(self) -> dict[str, Any]:
        found = self.mean_return()
        return {} if found is None else {"mean_return": found}


def _one_each(what: str, values: Tensor, shape: torch.Size) -> Tensor:
    """Return the values in this shape, if there is one for each place."""
    if values.numel() != shape.numel():
        raise MisconfigurationException(
            f"The {what} must have one number for each of {shape.numel()}. Got shape {tuple(values.shape)}; a critic "
            "ends in one number, and Independent(distribution, 1) adds up over the numbers of an action."
        )
    return values.reshape(shape)
