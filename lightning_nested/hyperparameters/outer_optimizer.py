"""The outer optimizer and its scheduler: made on demand, carried over to new tensors, copied and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_nested.hyperparameters.carry_over import Origins, carry_optimizer_
from lightning_nested.linalg.saved import require_keys

OuterOptimizer: TypeAlias = Callable[[Iterable[Tensor]], Optimizer]
OuterScheduler: TypeAlias = Callable[[Optimizer], LRScheduler]
# Those that a user sets, and no optimizer moves.
_OPTIONS = ("lr", "momentum", "betas", "weight_decay", "shrink")


def default_outer_optimizer(tensors: Iterable[Tensor]) -> Optimizer:
    """Adam of rate 0.05 on the unconstrained tensors: a decay moves by at most about 5 % a step."""
    return torch.optim.Adam(tensors, lr=0.05)


# A tensor of more entries than these holds numbers of one kind, each with a noisy gradient.
_MANY = 100


def planned_outer_optimizer(tensors: Iterable[Tensor], rate: float) -> Optimizer:
    """Adam of this rate, averaged over about ten steps; :class:`OuterAdam` if a tensor has more than 100 entries."""
    given = list(tensors)
    kind = OuterAdam if any(t.numel() > _MANY for t in given) else torch.optim.Adam
    return kind(given, lr=rate, betas=(0.9, 0.9), eps=1e-16)


class OuterAdam(torch.optim.Adam):
    """Adam, but with one step size for all entries of a tensor that has more than 100.

    λ ← λ − 8α clip(g/√(Σ_t mean(g_t²)), ±1) for such a tensor, with the sum over all steps so far and the mean over
    its entries; at least over the nonzero entries of g, so that a step which reaches few entries is no longer than
    others. Adam would move an entry that hardly matters as far as one that does, and by a late, small gradient as far
    as by the first. The state is one number per tensor, where Adam keeps two per entry.
    Ward, Wu & Bottou (2019), ICML, PMLR 97:6677-6686 (AdaGrad-Norm).
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make a step. Tensors of more than 100 entries have no ``.grad`` afterwards."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or p.numel() <= _MANY:
                    continue
                size = p.grad.square().sum()
                total = self.state[p].get("total", torch.zeros_like(size)) + size / p.numel()
                self.state[p]["total"] = total
                # Examples that were in no batch have zeros.
                scale = torch.maximum(total, size / p.grad.count_nonzero().clamp_min(1)).sqrt()
                # A few entries have gradients of many times the mean: none moves farther than 8α in a step.
                step = (p.grad / scale.clamp_min(torch.finfo(p.dtype).tiny)).clamp_(-1, 1)
                p.sub_(step, alpha=8 * group["lr"])
                p.grad = None
        return super().step(closure)


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
        self._tensors: tuple[Tensor, ...] = ()  # in the order of the optimizer's state
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
        self._optimizer, self.scheduler, self._tensors = optimizer, scheduler, tuple(tensors)

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
        self._optimizer, self.scheduler, self._tensors = None, None, ()

    def state_dict(self) -> dict[str, Any]:
        """Return the states and classes of both."""
        scheduler = self.scheduler
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "optimizer_class": type(self.optimizer).__name__,
            "scheduler_class": None if scheduler is None else type(scheduler).__name__,
        }

    def load_state_dict(
        self, state: Mapping[str, Any], tensors: Sequence[Tensor] = (), without: Iterable[Tensor] = ()
    ) -> list[str]:
        """Restore both, or start again what was of another class; saved options win, as in torch.

        Args:
            state: What :meth:`state_dict` returned, or an earlier version without classes.
            tensors: The tensors, in the order in which they were saved; none: those there are.
            without: Tensors whose saved state has no meaning any more.

        Returns:
            Messages for the user.
        """
        if tensors and [id(t) for t in tensors] != [id(t) for t in self._tensors]:
            self.start(tensors)
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        refused = restore_optimizer(self.optimizer, state["optimizer"], state.get("optimizer_class"))
        if refused is not None:
            return [f"The outer optimizer {refused}"]
        for tensor in without:
            self.optimizer.state.pop(tensor, None)
        return self._load_schedule(state, options)

    def _load_schedule(self, state: Mapping[str, Any], options: Sequence[Mapping[str, Any]]) -> list[str]:
        """Restore the scheduler of a restored optimizer, whose ``options`` were these before."""
        groups, schedule = self.optimizer.param_groups, state["scheduler"]
        own = None if self.scheduler is None else type(self.scheduler).__name__
        was = state.get("scheduler_class", own if schedule is not None else None)
        if own != was:
            # All of them: a scheduler keeps its bounds there too.
            for group, option in zip(groups, options, strict=True):
                tensors = group["params"]
                group.clear()
                group.update({"params": tensors, **option})
            return [
                f"The outer scheduler is {own}, and was {was} in the checkpoint: the learning rate starts again."
            ]
        if self.scheduler is not None:
            self.scheduler.load_state_dict(schedule)
        kept = _OPTIONS if self.scheduler is None else _OPTIONS[1:]
        others = [
            f"{key}={group[key]} instead of {key}={option[key]}"
            for group, option in zip(groups, options, strict=True)
            for key in kept
            if key in option and key in group and group[key] != option[key]
        ]
        if not others:
            return []
        return [f"The outer optimizer goes on with the options of the checkpoint: {', '.join(others)}."]

    def resume(self, tensors: Sequence[Tensor]) -> None:
        """Continue a copy, on tensors of its own."""
        if self._copied is not None:
            self.start(tensors)
            self.load_state_dict(self._copied)
            self._copied = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies of hyperparameters have tensors of their own, which a copied optimizer would not know.
        copied = self.state_dict() if self._optimizer is not None else None
        return {**self.__dict__, "_optimizer": None, "scheduler": None, "_tensors": (), "_copied": copied}


def restore_optimizer(optimizer: Optimizer, state: Mapping[str, Any], was: str | None) -> str | None:
    """Restore an optimizer from a state of its class ``was`` (None: not known), and of its groups.

    Returns:
        None, or the reason why it was left as it is: torch would load the state of any other class, and fail in the
        next step.
    """
    require_keys(state, ("state", "param_groups"), "the outer optimizer")
    own, groups, saved = type(optimizer).__name__, optimizer.param_groups, state["param_groups"]
    if own != was if was is not None else groups[0].keys() - saved[0].keys():
        was = was or "of another class"
        return f"is {own}, and was {was} in the checkpoint: it starts again, without memory."
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved]:
        return f"{own} has other groups of tensors than in the checkpoint: it starts again, without memory."
    optimizer.load_state_dict(dict(state))
    return None


def described(value: object) -> str:
    """Describe a wrong argument in an error."""
    if isinstance(value, type):
        return f"the class {value.__name__}; write {value.__name__}(...)"
    return f"{type(value).__name__} {value!r}"[:200]
