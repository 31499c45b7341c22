"""Files of the metrics' cache: one that cannot be read is made again, one that cannot be written is done without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_nested.files import replacing

T = TypeVar("T")


def read_cache(path: Path, convert: Callable[[Any], T]) -> T | None:
    """Return the converted content of a file, or None if there is none, or with a warning if it is damaged."""
    if not path.is_file():
        return None
    try:
        return convert(torch.load(path, map_location="cpu", weights_only=True))
    # What torch.load raises for a damaged file depends on where the damage is.
    except Exception as error:
        rank_zero_warn(
            f"A file of the metrics' cache must be readable. Got {path}: {type(error).__name__}: {error} "
            "It is made again."
        )
        return None


def write_cache(path: Path, content: Any) -> None:
    """Write a file, or warn that it cannot be written."""
    try:
        with replacing(path) as file:
            torch.save(content, file)
    # torch reports a full disk as a RuntimeError.
    except (OSError, RuntimeError) as error:
        rank_zero_warn(
            f"The metrics' cache must be a folder that can be written. Got {path}: {error}; scores go on without it. "
            "Give another one as GenerativeMetrics(cache=...)."
        )
