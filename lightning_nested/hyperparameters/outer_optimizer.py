"""The outer optimizer and its scheduler: made on demand, carried over to new tensors, copied and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_nested.hyperparameters.carry_over import Origins, carry_optimizer_

OuterOptimizer: TypeAlias = Callable[[Iterable[Tensor]], Optimizer]
OuterScheduler: TypeAlias = Callable[[Optimizer], LRScheduler]


def default_outer_optimizer(tensors: Iterable[Tensor]) -> Optimizer:
    """Adam of rate 0.05 on the unconstrained tensors: a decay moves by at most about 5 % a step."""
    return torch.optim.Adam(tensors, lr=0.05)


class OptimizerPair:
    """An optimizer and its scheduler, by functions that make them once the tensors are known.

    A copy holds their state only, until :meth:`resume` gives it tensors.
    """

    def __init__(self, make_optimizer: OuterOptimizer, make_scheduler: OuterScheduler | None) -> None:
        for function in (make_optimizer, make_scheduler):
            if function is not None and not callable(function):
                raise TypeError(
                    "optimizer and scheduler must be functions: of tensors, and of the optimizer. "
                    f"Got {described(function)}; write lambda tensors: torch.optim.Adam(tensors, lr=0.05)."
                )
        self._make_optimizer, self._make_scheduler = make_optimizer, make_scheduler
        self._optimizer: Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        self._copied: dict[str, Any] | None = None  # state of a copy that has no tensors yet

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer; only available once :meth:`start` has run."""
        if self._optimizer is None:
            raise AttributeError("optimizer is only available after build. Got none; call build first.")
        return self._optimizer

    def start(self, tensors: Sequence[Tensor]) -> None:
        """Make both for ``tensors``; refuse what needs more than one gradient per step."""
        optimizer = self._make_optimizer(list(tensors))
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "optimizer must be a function from tensors to a torch optimizer. "
                f"Got one that returns {type(optimizer).__name__}."
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "The outer optimizer must move by one gradient. Got LBFGS, which evaluates the loss again in each "
                "step; give torch.optim.Adam, for example."
            )
        scheduler = self._make_scheduler(optimizer) if self._make_scheduler is not None else None
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "The outer scheduler must step by itself. Got ReduceLROnPlateau, which waits for a metric; give "
                "ExponentialLR or CosineAnnealingLR, for example."
            )
        self._optimizer, self.scheduler = optimizer, scheduler

    def replace(self, make_optimizer: OuterOptimizer, make_scheduler: OuterScheduler | None) -> None:
        """Make others from now on; an optimizer that is there keeps its state and takes the new rate and schedule."""
        self._make_optimizer, self._make_scheduler = make_optimizer, make_scheduler
        if self._optimizer is not None:
            fresh = make_optimizer([torch.zeros(1)])
            for group in self._optimizer.param_groups:
                group["lr"] = group["initial_lr"] = fresh.param_groups[0]["lr"]
            self.scheduler = make_scheduler(self._optimizer) if make_scheduler is not None else None

    def carry_over(self, tensors: Sequence[Tensor], origins: Origins) -> None:
        """Start again for ``tensors``, with the schedule and the state of those that have an origin."""
        old, schedule = self._optimizer, self.scheduler
        self.start(tensors)
        if self.scheduler is not None and schedule is not None:
            self.scheduler.load_state_dict(schedule.state_dict())
        if old is not None:
            carry_optimizer_(self.optimizer, old, origins)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Return True if the optimizer moves exactly ``tensors``."""
        if self._optimizer is None:
            return False
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        return held == {id(t) for t in tensors}

    def step(self) -> None:
        """Step the optimizer by the tensors' gradients, then the scheduler."""
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def forget(self) -> None:
        """Drop both."""
        self._optimizer = self.scheduler = None

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        scheduler = self.scheduler.state_dict() if self.scheduler is not None else None
        return {"optimizer": self.optimizer.state_dict(), "scheduler": scheduler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore both."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])

    def resume(self, tensors: Sequence[Tensor]) -> None:
        """Continue a copy, on tensors of its own."""
        if self._copied is not None:
            self.start(tensors)
            self.load_state_dict(self._copied)
            self._copied = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies of hyperparameters have tensors of their own, which a copied optimizer would not know.
        copied = self.state_dict() if self._optimizer is not None else None
        return {**self.__dict__, "_optimizer": None, "scheduler": None, "_copied": copied}


def described(value: object) -> str:
    """Describe a wrong argument in an error."""
    if isinstance(value, type):
        return f"the class {value.__name__}; write {value.__name__}(...)"
    return f"{type(value).__name__} {value!r}"[:200]
