"""Fits of the Trainer that print and write nothing, for benchmarks that compare whole trainings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer


def quiet() -> None:
    """Silence Lightning's messages and all warnings of this process."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def plain_trainer(steps: int, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """Return a Trainer of so many steps on the CPU, without validation of its own, files and progress bar.

    Args:
        steps: Optimizer steps.
        callbacks: Callbacks of the run.
        **options: Further arguments of ``Trainer``.
    """
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=10**6,
        **options,
    )
