"""Experience of the policy that trains, from environments of Gymnasium."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributions import Categorical
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.extras import require_package
from lightning_nested.games import Rollout
from lightning_nested.networks.evaluation_mode import evaluation_mode


@checked
class ExperienceDataModule(LightningDataModule):
    """Experience of a module's policy in copies of a Gymnasium environment, new in every batch.

    A batch is a :class:`~lightning_nested.games.Rollout` of ``num_steps`` steps of each copy. It is played when the
    Trainer asks for it, by the policy as it is then: the module that trains has a method ``act(observations)``, as
    :class:`~lightning_nested.modules.ActorCritic` has. It plays in evaluation mode, without dropout, and in the
    Trainer's precision. Episodes go on from one batch to the next. Process r gives its environments the seed
    ``seed + 1000003 r``; a run that resumes from a checkpoint or reloads its loader begins new episodes, with a seed
    of their own.

    Actions are arrays of the action space's shape, one for each copy: floats for a ``Box`` of floats, clipped to its
    bounds, and whole numbers from 0 on for numbered actions, to which the ``start`` of the space is added.
    Observations that are floats or 8-bit integers (pixels) are given in the module's precision; numbers stay numbers.

    Args:
        environment: Name in Gymnasium's register. Observations and actions are arrays or numbers.
        options: Further arguments of ``gymnasium.make_vec``.
        num_environments: Copies, on each process.
        num_steps: Steps of each copy in a batch, at least 2.
        num_batches: Batches of an epoch.
        seed: Seed of the environments.

    Raises:
        MissingExtraError: Gymnasium is not installed.
        MisconfigurationException: The module that trains has no ``act``, or networks of sizes that do not fit
            the environment.
        ValueError: A number below 1, or ``num_steps`` below 2; an environment whose observations are no arrays, or that
            is not reset in the step after an episode's end (``AutoresetMode.NEXT_STEP``, Gymnasium's default); in
            ``fit``: actions of another shape, kind or range than the action space's.
    """

    def __init__(
        self,
        environment: str = "CartPole-v1",
        *,
        options: dict[str, Any] | None = None,
        num_environments: int = 8,
        num_steps: int = 32,
        num_batches: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, num_environments=num_environments, num_batches=num_batches)
        # One step may be a reset in all environments, and then nothing in the batch counts.
        at_least(2, num_steps=num_steps)
        at_least(0, seed=seed)
        self.environment, self.options, self.seed = environment, dict(options or {}), seed
        self.num_environments, self.num_steps, self.num_batches = num_environments, num_steps, num_batches
        self._made: Any = None

    @override
    def train_dataloader(self) -> Rollouts:
        require_package("gymnasium")
        import gymnasium

        trainer = self.trainer
        if trainer is None or not hasattr(trainer.lightning_module, "act"):
            got = "no Trainer" if trainer is None else type(trainer.lightning_module).__name__
            raise MisconfigurationException(
                "Experience needs a module that acts: act(observations) returns actions. "
                f"Got {got}; train an ActorCritic, or give your module the method."
            )
        self._close()
        self._made = gymnasium.make_vec(self.environment, num_envs=self.num_environments, **self.options)
        # A loader that is made in the middle of a run must not play the starts of the first one again.
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        return Rollouts(
            self._made,
            trainer.lightning_module,
            num_steps=self.num_steps,
            num_batches=self.num_batches,
            # Some environments take 31 bits.
            seed=(self.seed + 1_000_003 * trainer.global_rank + 1_000_000_007 * batches) % 2**31,
            precision=trainer.precision_plugin,
        )

    @override
    def teardown(self, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._made is not None:
            self._made.close()
        self._made = None


class Rollouts:
    """Loader that plays ``num_batches`` rollouts in each pass; episodes go on from one to the next.

    It has a length, without which the Trainer asks for a batch before the step on the one before it.
    """

    def __init__(
        self,
        environments: Any,
        module: Any,
        *,
        num_steps: int,
        num_batches: int,
        seed: int,
        precision: Precision = Precision(),  # noqa: B008 - without state
    ) -> None:
        from gymnasium.vector import AutoresetMode

        mode = environments.metadata.get("autoreset_mode")
        if mode != AutoresetMode.NEXT_STEP:
            raise ValueError(
                "An environment must be reset in the step after an episode's end (AutoresetMode.NEXT_STEP). "
                f"Got autoreset_mode={mode}; leave it at Gymnasium's default."
            )
        if (
            environments.single_observation_space.shape is None
            or environments.single_action_space.shape is None
        ):
            raise ValueError(
                "Observations and actions must be arrays or numbers. Got "
                f"{environments.single_observation_space} and {environments.single_action_space}; give the environment "
                "a wrapper such as gymnasium.wrappers.FlattenObservation, in options={'wrappers': [...]}."
            )
        self._environments, self._module, self._precision = environments, module, precision
        self._num_steps, self._num_batches = num_steps, num_batches
        self._observations, _ = environments.reset(seed=seed)
        self._ended = np.zeros(environments.num_envs, dtype=bool)
        self._sums = np.zeros(environments.num_envs)
        self._checked = False  # whether the module's sizes are those of the spaces

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Rollout]:
        for _ in range(self._num_batches):
            with evaluation_mode(self._module):
                rollout = self.play()
            yield rollout

    def play(self) -> Rollout:
        """Play ``num_steps`` steps by the policy as it is now."""
        seen, steps, returns = [_copy(self._observations)], [], list[float]()
        for _ in range(self._num_steps):
            actions = self._act(seen[-1])
            acts = ~self._ended
            self._observations, rewards, terminated, truncated, _ = self._environments.step(
                self._allowed(actions)
            )
            self._ended = terminated | truncated
            self._sums += rewards
            returns += self._sums[self._ended].tolist()
            self._sums[self._ended] = 0.0
            steps.append((actions, *map(_copy, (rewards, terminated, self._ended, acts))))
            seen.append(_copy(self._observations))
        actions, rewards, terminated, ended, counts = map(torch.stack, zip(*steps, strict=True))
        return Rollout(
            observations=torch.stack(seen),
            actions=actions,
            rewards=rewards,
            terminated=terminated,
            ended=ended,
            counts=counts,
            returns=torch.tensor(returns),
        )

    @torch.no_grad()
    def _act(self, observations: Tensor) -> Tensor:
        seen = self._precision.convert_input(observations.to(self._module.device))
        with self._precision.forward_context():
            actions = self._act_first(seen) if not self._checked else self._module.act(seen)
        return cast("Tensor", actions).cpu()

    def _act_first(self, observations: Tensor) -> Tensor:
        """Act for the first time, and refuse networks that do not fit the environment."""
        seen, space = self._environments.single_observation_space, self._environments.single_action_space
        try:
            actions: Tensor = self._module.act(observations)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise MisconfigurationException(
                f"The module must act on observations of the environment: {seen}, in batches of shape "
                f"{tuple(observations.shape)}. Got {type(error).__name__}: {error}; give it networks of these sizes. "
                "Observations that are a number need an embedding, or gymnasium.wrappers.FlattenObservation in "
                "options={'wrappers': [...]}."
            ) from error
        choices = self._choices(observations)
        if choices not in (None, getattr(space, "n", None)):
            raise MisconfigurationException(
                f"The module must choose actions of the environment: {space}. Got a policy over {choices} actions; the "
                "actor ends in a number for each of the environment's actions."
            )
        self._checked = True
        return actions

    def _choices(self, observations: Tensor) -> int | None:
        """Return the number of actions that the module's policy is over; None if it is not over numbered ones."""
        if not hasattr(self._module, "policy"):
            return None
        with torch.random.fork_rng(devices=[]):
            policy = self._module.policy(observations)
        return policy.logits.shape[-1] if isinstance(policy, Categorical) else None

    def _allowed(self, actions: Tensor) -> np.ndarray:
        """Return the actions as the environments take them; the policy's loss is of those it chose.

        Raises:
            ValueError: They are none of the action space.
        """
        space: Any = self._environments.single_action_space
        shape = (self._environments.num_envs, *space.shape)
        floats = bool(np.issubdtype(space.dtype, np.floating))
        # NumPy has no bfloat16.
        found = (actions.float() if actions.dtype == torch.bfloat16 else actions).numpy()
        if found.shape != shape:
            raise ValueError(
                f"act must return an action for each environment, here of shape {shape} for {space}. Got shape "
                f"{found.shape}; override policy: Categorical draws numbers, Independent(Normal(...), 1) arrays."
            )
        # Samples of Bernoulli are floats, but whole numbers.
        if not (actions.is_floating_point() if floats else np.array_equal(found, np.rint(found))):
            raise ValueError(
                f"Actions must be {'floats' if floats else 'whole numbers'} for {space}. Got {actions.dtype}; "
                "override policy: Categorical is for numbered actions, Independent(Normal(...), 1) for continuous ones."
            )
        if hasattr(space, "low"):
            clipped: np.ndarray = np.clip(found, space.low, space.high).astype(space.dtype)
            return clipped
        copies = self._environments.action_space
        started = (found + getattr(space, "start", 0)).astype(copies.dtype)
        if not copies.contains(started):
            raise ValueError(
                f"Actions must be numbered from 0 on, as many as {space} has. Got {found.tolist()}; give the policy "
                "one output for each action."
            )
        return started


def _copy(values: np.ndarray) -> Tensor:
    """Return a copy that networks take: environments may use their arrays again."""
    found = torch.tensor(values)
    pixels = found.dtype in (torch.uint8, torch.int8)
    return found.to(torch.get_default_dtype()) if pixels or found.is_floating_point() else found
