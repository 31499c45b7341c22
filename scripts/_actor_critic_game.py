"""An actor and a critic on CartPole, many seeds at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from _network_games import NetworkGame, StackedMLP
from torch import Tensor

from lightning_nested.extras import require_package
from lightning_nested.games import generalized_advantages


class CartPoles:
    """Eight carts a seed in one vector environment, each seed with random starts of its own."""

    each = 8

    def __init__(self, seeds: Sequence[int]) -> None:
        require_package("gymnasium")
        import gymnasium

        self.count = len(seeds)
        size = self.count * self.each
        made = gymnasium.make_vec("CartPole-v1", num_envs=size, vectorization_mode="vector_entry_point")
        self._carts = made.unwrapped
        self._carts.reset(seed=0)
        self._starts = [np.random.default_rng(104_729 * seed + 3) for seed in seeds]
        self._lengths = np.zeros(size)
        self.ended = np.ones(size, dtype=bool)
        self._restart()
        self.ended = np.zeros(size, dtype=bool)
        self.returns: list[deque[float]] = [deque(maxlen=100) for _ in seeds]

    def observations(self) -> Tensor:
        """Return (carts, seeds, 4)."""
        return self.stacked(self._carts.state.T.astype(np.float32))

    def step(self, actions: Tensor) -> list[Tensor]:
        """Push every cart, (carts, seeds); return rewards, final states, ends of episodes and which carts moved."""
        moved = ~self.ended
        _, rewards, terminated, truncated, _ = self._carts.step(actions.T.flatten().numpy())
        self._restart()
        self.ended = terminated | truncated
        self._lengths += rewards
        for place in np.flatnonzero(self.ended):
            self.returns[place // self.each].append(float(self._lengths[place]))
        self._lengths[self.ended] = 0
        return [self.stacked(v) for v in (rewards, terminated, self.ended, moved)]

    def stacked(self, values: np.ndarray) -> Tensor:
        """Return (carts, seeds, ...) of (seeds · carts, ...)."""
        return torch.from_numpy(values.reshape(self.count, self.each, *values.shape[1:])).transpose(0, 1)

    def _restart(self) -> None:
        # The environment draws the starts of all seeds from one stream: replace those that it drew in this step.
        for place in np.flatnonzero(self.ended):
            self._carts.state[:, place] = self._starts[place // self.each].uniform(-0.05, 0.05, 4)


class ActorCriticGame(NetworkGame):
    """Advantage actor-critic on CartPole. Score: mean return of the last 100 episodes of training.

    An update is one rollout of 32 steps of eight carts, on which first the actor steps and then the critic.
    """

    fresh_batches = False
    steps, entropy = 32, 0.01

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds)
        self.actor, self.critic = StackedMLP(seeds, [4, 64, 64, 2], 1), StackedMLP(seeds, [4, 64, 64, 1], 2)
        self.players = {name: list(getattr(self, name).parameters()) for name in ("actor", "critic")}
        self.carts = CartPoles(seeds)

    @torch.no_grad()
    def resample(self) -> None:
        """Play the current policies."""
        draws = [torch.rand(self.steps, self.carts.each, generator=g) for g in self.streams]
        seen, actions, rest = [self.carts.observations()], [], []
        for draw in torch.stack(draws, dim=2):
            logits = self.actor(seen[-1])
            actions.append((draw < torch.sigmoid(logits[..., 1] - logits[..., 0])).long())
            rest.append(self.carts.step(actions[-1]))
            seen.append(self.carts.observations())
        self.seen, self.actions = torch.stack(seen), torch.stack(actions)
        self.rewards, self.terminated, self.ended, moved = map(torch.stack, zip(*rest, strict=True))
        self.weight = moved / moved.sum((0, 1))

    def loss(self, player: str) -> Tensor:
        """Return the policy's loss with entropy, or the squared error of the values; a mean over steps."""
        values = self._over(self.critic, self.seen)[..., 0]
        advantages = generalized_advantages(self.rewards, values.detach(), self.terminated, self.ended)
        if player == "critic":
            targets = advantages + values[:-1].detach()
            return ((values[:-1] - targets).square() * self.weight).sum()
        centred = advantages - (advantages * self.weight).sum((0, 1))
        scaled = centred / ((centred.square() * self.weight).sum((0, 1)).sqrt() + 1e-8)
        log = self._over(self.actor, self.seen[:-1]).log_softmax(-1)
        chosen = log.gather(-1, self.actions[..., None])[..., 0]
        entropy = -(log.exp() * log).sum(-1)
        return -((chosen * scaled + self.entropy * entropy) * self.weight).sum()

    def scores(self) -> list[float]:
        """Return the mean of the last returns of each seed."""
        return [float(np.mean(found or [np.nan])) for found in self.carts.returns]

    @staticmethod
    def _over(network: StackedMLP, x: Tensor) -> Tensor:
        """Map (steps, carts, seeds, in) to (steps, carts, seeds, out)."""
        found: Tensor = network(x.flatten(0, 1))
        return found.view(*x.shape[:2], *found.shape[1:])
