"""One way to make the Trainers of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer


def trainer(*callbacks: Callback, folder: Path | None = None, **options: Any) -> Trainer:
    """Return a Trainer for one epoch on one CPU process, silent and without files.

    Args:
        callbacks: Callbacks of the run.
        folder: Where the run may write; None: the working folder, which nothing is written to by default.
        options: Arguments of ``Trainer`` that replace those defaults.
    """
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), default_root_dir=folder, **{**defaults, **options})
