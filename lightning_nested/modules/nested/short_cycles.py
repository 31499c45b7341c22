"""Unrolled cycles that an epoch is too short for."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_nested.modules.nested.strategies import GradientStrategy


def warn_of_short_cycles(trainer: Trainer, gradient: GradientStrategy, accumulate: int) -> None:
    """Warn at the start of a fit whose cycles close early, as an epoch has fewer inner steps than a cycle.

    A ``max_steps`` below the cycle is left alone: the Trainer's searches and trial runs set one.

    Args:
        trainer: Trainer of the run.
        gradient: Strategy of the module.
        accumulate: Batches of an inner step.
    """
    length, batches = gradient.length, trainer.num_training_batches
    if length is None or not gradient.ends_with_epoch or math.isinf(batches):
        return
    fits = math.ceil(batches / accumulate)
    if fits < length and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        steps = length * accumulate
        rank_zero_warn(
            f"num_steps must not be larger than the number of inner steps of an epoch. Got {gradient} with {fits}: a "
            f"cycle closes at the epoch's end, so an outer step differentiates through {fits} inner steps. Make epochs "
            f"longer (a sampler with more num_samples; StepsDataModule(steps={steps}) if the losses need no batches), "
            f"or set num_steps={fits}."
        )
