"""An actor and a critic on CartPole and Pendulum, many seeds at once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _network_games import NetworkGame, StackedMLP
from torch import Tensor, nn
from torch.distributions import Normal

from lightning_nested.extras import require_package
from lightning_nested.games import generalized_advantages


class Environments(ABC):
    """Copies of an environment for each seed, with random starts of the seed's own.

    As in Gymnasium's vector environments, the step after the end of an episode moves nothing: it starts the next.

    Attributes:
        each: Copies for a seed.
        sizes: Numbers in an observation; outputs of an actor.
        ended: Copies whose episode has ended, (seeds · each,).
        returns: Sums of rewards of each seed's last 100 episodes.
    """

    each: int
    sizes: tuple[int, int]

    def __init__(self, seeds: Sequence[int]) -> None:
        self.count = len(seeds)
        self.starts = [np.random.default_rng(104_729 * seed + 3) for seed in seeds]
        self.ended = np.zeros(self.count * self.each, dtype=bool)
        self._totals = np.zeros(len(self.ended))
        self.returns: list[deque[float]] = [deque(maxlen=100) for _ in seeds]

    @abstractmethod
    def observations(self) -> Tensor:
        """Return (each, seeds, size)."""

    @abstractmethod
    def move(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step every copy, or start it where ``ended``; return rewards, final states, ends of episodes."""

    def step(self, actions: Tensor) -> list[Tensor]:
        """Act in every copy, (each, seeds); return rewards, final states, ends of episodes and which copies moved."""
        moved = ~self.ended
        rewards, terminated, self.ended = self.move(actions.T.flatten().numpy())
        self._totals += rewards
        for place in np.flatnonzero(self.ended):
            self.returns[place // self.each].append(float(self._totals[place]))
        self._totals[self.ended] = 0
        return [self.stacked(v) for v in (rewards, terminated, self.ended, moved)]

    def stacked(self, values: np.ndarray) -> Tensor:
        """Return (each, seeds, ...) of (seeds · each, ...)."""
        return torch.from_numpy(values.reshape(self.count, self.each, *values.shape[1:])).transpose(0, 1)


class CartPoles(Environments):
    """Eight carts a seed in one vector environment."""

    each, sizes = 8, (4, 2)

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds)
        require_package("gymnasium")
        import gymnasium

        size = len(self.ended)
        made = gymnasium.make_vec("CartPole-v1", num_envs=size, vectorization_mode="vector_entry_point")
        self._carts: Any = made.unwrapped
        self._carts.reset(seed=0)
        self._restart(np.arange(size))

    def observations(self) -> Tensor:
        """Return positions, angles and their speeds."""
        return self.stacked(self._carts.state.T.astype(np.float32))

    def move(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Push every cart."""
        _, rewards, terminated, truncated, _ = self._carts.step(actions)
        self._restart(np.flatnonzero(self.ended))
        return rewards, terminated, terminated | truncated

    def _restart(self, places: np.ndarray) -> None:
        # The environment draws the starts of all seeds from one stream: replace those that it drew in this step.
        for place in places:
            self._carts.state[:, place] = self.starts[place // self.each].uniform(-0.05, 0.05, 4)


class Pendulums(Environments):
    """Gymnasium's ``Pendulum-v1``, all copies at once: Gymnasium has it one at a time only.

    An episode has 200 steps. The first of each copy is shorter, so that the copies of a seed end at different times.
    """

    each, sizes, limit = 16, (3, 1), 200

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds)
        self.angles, self.speeds = np.zeros((2, len(self.ended)))
        self.lengths = np.zeros(len(self.ended), dtype=int)
        self._restart(np.arange(len(self.ended)))
        self.lengths[:] = np.tile(np.arange(self.each) * self.limit // self.each, self.count)

    def observations(self) -> Tensor:
        """Return the cosine and sine of the angle, and its speed."""
        seen = np.stack([np.cos(self.angles), np.sin(self.angles), self.speeds], axis=-1)
        return self.stacked(seen.astype(np.float32))

    def move(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Turn every pendulum by a torque of -2 to 2."""
        torques, before = np.clip(actions, -2, 2), np.flatnonzero(self.ended)
        angles = (self.angles + math.pi) % (2 * math.pi) - math.pi
        rewards = -(angles**2 + 0.1 * self.speeds**2 + 0.001 * torques**2)
        # Gravity of 10, mass and length of 1, steps of 0.05.
        self.speeds = np.clip(self.speeds + 0.05 * (15 * np.sin(self.angles) + 3 * torques), -8, 8)
        self.angles = self.angles + 0.05 * self.speeds
        self.lengths += 1
        rewards[before] = 0
        self._restart(before)
        return rewards, np.zeros_like(self.ended), self.lengths == self.limit

    def _restart(self, places: np.ndarray) -> None:
        for place in places:
            stream = self.starts[place // self.each]
            self.angles[place], self.speeds[place] = stream.uniform([-math.pi, -1], [math.pi, 1])
        self.lengths[places] = 0


class ActorCriticGame(NetworkGame):
    """Advantage actor-critic on CartPole. Score: mean return of the last 100 episodes of training.

    An update is one rollout of 32 steps of eight carts, on which first the actor steps and then the critic.
    """

    fresh_batches = False
    environments: type[Environments] = CartPoles
    steps, entropy, discount, reward_scale = 32, 0.01, 0.99, 1.0

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds)
        inputs, outputs = self.environments.sizes
        self.actor = StackedMLP(seeds, [inputs, 64, 64, outputs], 1)
        self.critic = StackedMLP(seeds, [inputs, 64, 64, 1], 2)
        self.players = {name: list(getattr(self, name).parameters()) for name in ("actor", "critic")}
        self.copies = self.environments(seeds)

    @torch.no_grad()
    def resample(self) -> None:
        """Play the current policies."""
        draws = [torch.rand(self.steps, self.copies.each, generator=g) for g in self.streams]
        seen, actions, rest = [self.copies.observations()], [], []
        for draw in torch.stack(draws, dim=2):
            actions.append(self.act(self.actor(seen[-1]), draw))
            rest.append(self.copies.step(actions[-1]))
            seen.append(self.copies.observations())
        self.seen, self.actions = torch.stack(seen), torch.stack(actions)
        rewards, self.terminated, self.ended, moved = map(torch.stack, zip(*rest, strict=True))
        self.rewards = self.reward_scale * rewards
        self.weight = moved / moved.sum((0, 1))

    def loss(self, player: str) -> Tensor:
        """Return the policy's loss with entropy, or the squared error of the values; a mean over steps."""
        values = self._over(self.critic, self.seen)[..., 0]
        advantages = generalized_advantages(
            self.rewards, values.detach(), self.terminated, self.ended, discount=self.discount
        )
        if player == "critic":
            targets = advantages + values[:-1].detach()
            return ((values[:-1] - targets).square() * self.weight).sum()
        centred = advantages - (advantages * self.weight).sum((0, 1))
        scaled = centred / ((centred.square() * self.weight).sum((0, 1)).sqrt() + 1e-8)
        chosen, entropy = self.log_prob_and_entropy(self._over(self.actor, self.seen[:-1]))
        return -((chosen * scaled + self.entropy * entropy) * self.weight).sum()

    def act(self, outputs: Tensor, draws: Tensor) -> Tensor:
        """Return an action for each of the actor's outputs (..., size), from uniform draws (...)."""
        return (draws < torch.sigmoid(outputs[..., 1] - outputs[..., 0])).long()

    def log_prob_and_entropy(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of the rollout's actions and the policy's entropies."""
        log = outputs.log_softmax(-1)
        return log.gather(-1, self.actions[..., None])[..., 0], -(log.exp() * log).sum(-1)

    def scores(self) -> list[float]:
        """Return the mean of the last returns of each seed."""
        return [float(np.mean(found or [np.nan])) for found in self.copies.returns]

    @staticmethod
    def _over(network: StackedMLP, x: Tensor) -> Tensor:
        """Map (steps, copies, seeds, in) to (steps, copies, seeds, out)."""
        found: Tensor = network(x.flatten(0, 1))
        return found.view(*x.shape[:2], *found.shape[1:])


class PendulumGame(ActorCriticGame):
    """The same on Pendulum: a normal policy, whose deviation is one learned number for each seed.

    An update is one rollout of 20 steps of 16 pendulums. Rewards are scaled in training, not in the score.
    """

    environments = Pendulums
    steps, entropy, discount, reward_scale = 20, 0.0, 0.95, 0.05

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds)
        self.log_std = nn.Parameter(torch.zeros(len(seeds)))
        self.players["actor"].append(self.log_std)

    def act(self, outputs: Tensor, draws: Tensor) -> Tensor:
        """Return torques."""
        # A draw of 0 would give an infinite one.
        torques: Tensor = outputs[..., 0] + self.log_std.exp() * torch.special.ndtri(draws.clamp(min=1e-7))
        return torques

    def log_prob_and_entropy(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of torques, which are clipped later, in the environment."""
        policy: Any = Normal(outputs[..., 0], self.log_std.exp(), validate_args=False)
        return policy.log_prob(self.actions), policy.entropy()
