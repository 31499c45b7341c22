"""Interface by which LyapunovCallback carries tangents through the steps of a run, of one loss or of a game."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.dynamics.tangents import Tangents
from lightning_nested.linalg.saved import require_keys
from lightning_nested.optim.registry import known_rule
from lightning_nested.optim.update_rules import UpdateRule
from lightning_nested.trainer.fixed_batches import FixedBatches

GRADIENT_HOOKS = (
    "LyapunovCallback needs gradients that nobody changes: a hook of Tensor.register_hook would act on its products "
    "too, and the exponents be wrong. Got a parameter with such a hook; remove it, or clip by "
    "Trainer(gradient_clip_val=...)."
)


def has_gradient_hooks(params: Iterable[Tensor]) -> bool:
    """Return True if a parameter has hooks of ``Tensor.register_hook``."""
    return any(p._backward_hooks for p in params)


class Follower(ABC):
    """Pushes the tangents of a tracker through the steps of a running Trainer.

    Refuses ``params`` with gradient hooks. With ``fixed``, losses of batches that are kept replace those of the run;
    ``rule`` is the update rule of optimizers that the package does not know.

    Attributes:
        unit: Name of a step, for figures.
        tracker: Tangents and their growth.
        steps: Number of steps before the current one.
        is_open: True while the current batch belongs to a step that is followed.
        stopped: True once the measurement has ended early.
    """

    unit: ClassVar[str]
    tracker: Tangents

    def __init__(
        self,
        trainer: Trainer,
        module: Any,
        optimizers: Sequence[Optimizer],
        params: Iterable[Tensor],
        *,
        fixed: bool,
        rule: UpdateRule | None,
    ) -> None:
        if has_gradient_hooks(params):
            raise MisconfigurationException(GRADIENT_HOOKS)
        self.trainer, self.module, self.rule = trainer, module, rule
        self.fixed = FixedBatches(trainer) if fixed else None
        self.steps, self.is_open, self.stopped = 0, False, False
        self._waiting: dict[str, Any] | None = None  # saved tangents of parameters that are frozen now
        self.call = 0  # evaluations in the current step, each with a fixed batch of its own
        for optimizer in optimizers:
            for group in optimizer.param_groups if rule is None else ():
                known_rule(optimizer, group)  # raises for an optimizer that is not known

    def stop(self, reason: object) -> None:
        """End the measurement with a warning; the run goes on."""
        rank_zero_warn(f"LyapunovCallback stops at step {self.steps}: {reason}")
        self.stopped, self.is_open = True, False

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Stop where tangents are no longer finite."""
        try:
            yield
        except FloatingPointError as error:
            self.stop(error)

    @abstractmethod
    def begin_batch(self, batch: Any) -> None:
        """Prepare for a batch of the run, before it is decided whether its step is followed."""

    @abstractmethod
    def observe(self, loss: Tensor) -> None:
        """Compute the products that tangents need, just before the backward pass of ``loss``."""

    @abstractmethod
    def advance(self, optimizer: Optimizer) -> bool:
        """Push tangents through the coming step of an optimizer; return True if that ended a window."""

    @abstractmethod
    def end_batch(self) -> bool:
        """Count the step if this batch completed it; return True if that ended a window."""

    @abstractmethod
    def logged_steps(self) -> int:
        """Return the number of steps by the clock of ``log_every_n_steps``."""

    @abstractmethod
    def log(self, metrics: dict[str, float]) -> None:
        """Send metrics of the current step to the loggers."""

    @abstractmethod
    def put_back(self) -> None:
        """Restore the methods of the module that were replaced."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact resume needs; called on all processes together."""
        fixed = None if self.fixed is None else self.fixed.state_dict()
        waits = self._waiting or {
            "tracker": self.tracker.state_dict(),
            "parameters": self._parameter_shapes(),
        }
        return {**waits, "steps": self.steps, "fixed": fixed, "call": self.call}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Where some of the saved parameters are frozen now, or others are not any more, tangents wait for
        :meth:`resume_tangents`: finetuning callbacks unfreeze layers only after a checkpoint has been restored.

        Raises:
            ValueError: A key lacks, or the tangents are of other parameters.
        """
        require_keys(state, ("tracker", "steps", "fixed", "call"), "LyapunovCallback")
        saved, own = state.get("parameters"), self._parameter_shapes()
        if saved is None or list(saved.items()) == list(own.items()):
            self.tracker.load_state_dict(state["tracker"])
        else:
            shared = saved.keys() & own.keys()
            if not shared or any(list(saved[name]) != own[name] for name in shared):
                raise ValueError(
                    f"Saved tangents must be of this model's parameters {own}. Got those of {saved}."
                )
            self._waiting = {"tracker": state["tracker"], "parameters": saved}
            self.tracker.load_state_dict({**state["tracker"], "frame": None, "slots": []})
        self.steps, self.call = state["steps"], state["call"]
        if self.fixed is not None and state["fixed"] is not None:
            self.fixed.load_state_dict(state["fixed"])

    def resume_tangents(self) -> None:
        """Restore tangents that wait for the parameters that are followed now; drop them once others have begun."""
        waiting = self._waiting
        if waiting is None:
            return
        matches = list(waiting["parameters"].items()) == list(self._parameter_shapes().items())
        if matches and self.tracker.frame is None:
            self.tracker.load_state_dict(waiting["tracker"])
        if matches or self.tracker.frame is not None:
            self._waiting = None

    def _parameter_shapes(self) -> dict[str, list[int]]:
        """Return the shapes of the parameters that are followed, by name, in their order."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        params = self.tracker.params
        return {names.get(id(p), f"parameter{i}"): list(p.shape) for i, p in enumerate(params)}
