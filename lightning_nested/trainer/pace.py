"""How often outer steps are made, and how long they are: a plan from the length of the run and a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_nested.hyperparameters import GroupSampler
from lightning_nested.trainer.lightning import wrapped_sampler

# Most and fewest outer steps of a run: more only cost time, with fewer the values stay noisy.
_MOST, _FEWEST = 100, 25
# Outer steps for which a look at a whole training set is given up, and batches looked at in part.
_PASSES = 6
# Cost of a batch at two weights without a gradient by them, in gradients.
PASS = 2 / 3
# How far all outer steps together can move log(decay): from the start to either bound, and a little more.
_TRAVEL = 4.0
_LONGEST = 0.25


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Times and lengths of outer steps.

    Attributes:
        total_steps: Inner steps of the run; None: it has no known end.
        every_n_steps: Inner steps per outer step.
        warmup_steps: Inner steps before the first outer step.
        cost: Cost of an outer step, in gradients of a training batch.
        outer_batches: Outer batches in a round over their data; None: unknown.
        began: Inner steps counted before the run, by the outer loop and by the Trainer: a second fit counts on.
        passes: Passes of the run through its data; infinite where unknown.
        late: Share of the run before its first outer step, wherever it began; None: ``warmup_steps`` are counted from
            the first of several fits.
    """

    total_steps: int | None
    every_n_steps: int
    warmup_steps: int
    cost: float
    outer_batches: int | None = None
    began: tuple[int, int] = (0, 0)
    passes: float = math.inf
    late: float | None = None

    def begun_at(self, began: tuple[int, int]) -> Pace:
        """Return the plan of a run of the same length that began there."""
        warmup = self.warmup_steps if self.late is None else _start_after(self.total_steps, self.late, began)
        return replace(self, began=began, warmup_steps=warmup)

    @property
    def outer_steps(self) -> int | None:
        """Outer steps of the run."""
        if self.total_steps is None:
            return None
        first, made = self.began
        return max(
            0, self._outer_steps_before(first + self.total_steps - made) - self._outer_steps_before(first)
        )

    def _outer_steps_before(self, inner_step: int) -> int:
        return max(0, -(-(inner_step - self.warmup_steps) // self.every_n_steps))

    def last_restart(self, every: int | None) -> float:
        """Return the inner step up to which a restart leaves the time of ``every`` outer steps to train again."""
        if self.total_steps is None or every is None:
            return math.inf
        first, made = self.began
        return first + self.total_steps - made - every * self.every_n_steps

    @property
    def rate(self) -> float:
        """First rate of the default outer optimizer, which ends at zero with the run."""
        return _LONGEST if not self.outer_steps else min(_LONGEST, 2 * _TRAVEL / self.outer_steps)

    def __str__(self) -> str:
        share = 100 * self.cost / self.every_n_steps
        return (
            f"an outer step costs about {self.cost:.1f} gradients, every {self.every_n_steps} steps: {share:.0f} %"
            + (f", {self.outer_steps} outer steps" if self.outer_steps is not None else "")
        )


def plan(
    trainer: Trainer,
    *,
    cost: float,
    overhead: float,
    every_n_steps: int | None,
    warmup_steps: int | None,
    warmup_share: float = 0.1,
    limited: bool = True,
    late: bool = False,
    accumulate: int | None = None,
    outer_batches: int | None = None,
    began: tuple[int, int] = (0, 0),
) -> Pace:
    """Return the plan of a run.

    Outer steps are made as often as ``overhead`` allows, but only about once in 40 inner steps, and 25 to 100 times in
    a run. A run without an end is planned by the budget alone.

    Args:
        trainer: Trainer of the run, whose loaders can be asked for.
        cost: Cost of an outer step, in gradients.
        overhead: Share of the training's own gradients that outer steps may cost.
        every_n_steps: Given by the user; None: by the budget.
        warmup_steps: Given by the user; None: by the share.
        warmup_share: Share of the run before the first outer step.
        limited: Whether a hundred outer steps are enough.
        late: Whether the budget of the whole run is for the steps after the warm-up, which a second fit has too.
        accumulate: See :func:`total_steps`.
        outer_batches: Outer batches in a round; None: unknown.
        began: See :class:`Pace`.
    """
    total = total_steps(trainer, accumulate)
    planned_late = late and warmup_steps is None
    if warmup_steps is not None:
        warmup = warmup_steps
    else:
        warmup = _start_after(total, warmup_share, began if planned_late else (0, 0))
    if every_n_steps is None:
        # Of the run's own steps those after the warm-up: a second fit counts on.
        first, made = began
        own = (total or 0) - made
        steps = max(0, own - max(0, warmup - first)) / own if late and own > 0 else 1.0
        # Rounded, or 10 steps would be 11.
        every_n_steps = max(1, math.ceil(round(cost * steps / overhead, 9)))
        if total is not None and limited:
            most = min(_MOST, max(_FEWEST, (total - warmup) // 40))
            every_n_steps = max(every_n_steps, (total - warmup) // most)
    return Pace(
        total_steps=total,
        every_n_steps=every_n_steps,
        warmup_steps=warmup,
        cost=cost,
        outer_batches=outer_batches,
        began=began,
        passes=_passes(trainer, total, accumulate),
        late=warmup_share if planned_late else None,
    )


def _start_after(total: int | None, share: float, began: tuple[int, int]) -> int:
    """Return the inner step after a share of the run's own steps."""
    first, made = began
    return first + int(max(0, (total or 0) - made) * share)


def _passes(trainer: Trainer, total: int | None, accumulate: int | None) -> float:
    """Return the passes through the data of ``total`` inner steps; infinite where the batches of one are unknown."""
    batches = _batches_of_data(trainer)
    if total is None or not math.isfinite(batches) or batches < 1:
        return math.inf
    return total * (trainer.accumulate_grad_batches if accumulate is None else accumulate) / batches


def _batches_of_data(trainer: Trainer) -> float:
    """Return the batches of all training data: of an epoch, unless each epoch draws anew from more data, or fewer."""
    loaders = CombinedLoader(getattr(trainer, "train_dataloader", None)).flattened
    # Several may go round at different speeds.
    drawn = _batches_drawn_from(loaders[0]) if len(loaders) == 1 else None
    return trainer.num_training_batches if drawn is None else drawn


def _batches_drawn_from(loader: Any) -> float | None:
    """Return the batches that a loader would have with all its data, on this process; None: unknown."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader, "sampler", None) if sampler is None else sampler
    while isinstance(sampler, BatchSampler):
        sampler = sampler.sampler
    examples = _examples_drawn_from(sampler)
    batches = None if examples is None else sized_len(loader)
    # An epoch of the Trainer's may be shorter than the loader, and the loader's than the data.
    return None if not examples or not batches else batches * examples / len(sampler)


def _examples_drawn_from(sampler: Any) -> float | None:
    """Return the number of examples from which a sampler draws each epoch anew, on this process; None: unknown."""
    if isinstance(sampler, DistributedSampler):
        wrapped = wrapped_sampler(sampler)
        every = _examples_drawn_from(wrapped)
        if wrapped is None and sampler.shuffle:
            every = sized_len(sampler.dataset)
        return None if every is None else every / sampler.num_replicas
    if isinstance(sampler, RandomSampler):
        return len(sampler.data_source)
    if isinstance(sampler, SubsetRandomSampler):
        return len(sampler.indices)
    if isinstance(sampler, WeightedRandomSampler):
        return len(sampler.weights)
    return sum(map(len, sampler.rows)) if isinstance(sampler, GroupSampler) else None


def affordable_batches(
    trainer: Trainer,
    *,
    cost: float,
    overhead: float,
    every_n_steps: int | None,
    accumulate: int | None,
    batches: int,
) -> int:
    """Return the training batches that an outer step can look at: all of an epoch, or as many as the budget allows.

    Args:
        trainer: Trainer of the run, whose loaders are set up.
        cost: Cost of an outer step without them, in gradients.
        overhead: Share of the training's own gradients that outer steps may cost.
        every_n_steps: Given by the user; None: there are to be at least a few outer steps.
        accumulate: See :func:`total_steps`.
        batches: Batches of an inner step.
    """
    epoch, total = trainer.num_training_batches, total_steps(trainer, accumulate)
    if every_n_steps is not None:
        budget = overhead * every_n_steps
    elif total is not None:
        budget = 0.9 * overhead * total / _PASSES
    else:
        return int(min(epoch, _MOST))
    return int(max(1, min(epoch, (budget - cost) * batches / PASS)))


def total_steps(trainer: Trainer, accumulate: int | None = None) -> int | None:
    """Return the inner steps of the run; None if the Trainer does not know them.

    Args:
        trainer: Trainer of the run.
        accumulate: Batches of an inner step where the module accumulates them itself; None: the Trainer does.
    """
    steps = trainer.estimated_stepping_batches
    if accumulate is not None:
        batches, epochs = trainer.num_training_batches, trainer.max_epochs
        if math.isfinite(batches) and epochs is not None and epochs > 0:
            limit = math.inf if trainer.max_steps < 0 else trainer.max_steps
            steps = min(math.ceil(batches / accumulate) * epochs, limit)
    return int(steps) if math.isfinite(steps) and steps > 0 else None


def batch_ratio(inner: Any, outer: Any) -> float:
    """Return examples of an outer batch per example of an inner one, 1 where loaders do not say."""
    own, other = (getattr(loader, "batch_size", None) for loader in (inner, outer))
    if not (isinstance(own, int) and isinstance(other, int) and own > 0):
        return 1.0
    return other / own


def steps_left(trainer: Trainer, batch_idx: int, accumulate: int) -> float:
    """Return the inner steps up to the end of the epoch or the run, this one included; infinite where unknown.

    Args:
        trainer: Trainer of the run, of a module that accumulates batches itself.
        batch_idx: Index of the current batch.
        accumulate: Batches of an inner step.
    """
    left, batches = math.inf, trainer.num_training_batches
    if not math.isinf(batches):
        left = math.ceil(batches / accumulate) - batch_idx // accumulate
    if trainer.is_last_batch:
        left = 1
    if trainer.max_steps > 0:
        left = min(left, trainer.max_steps - trainer.global_step)
    return left
