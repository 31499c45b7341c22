"""Checks of arguments that several classes of this package share."""

from __future__ import annotations

import os


def require_at_least(least: int, **values: int | None) -> None:
    """Raise ValueError for the first of these arguments that is less than ``least``; None is allowed."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}. Got {value}.")


def require_window(window: str) -> None:
    """Raise ValueError unless ``window`` names weights of :func:`window_weights`."""
    if window not in ("uniform", "bump"):
        raise ValueError(f"window must be 'uniform' or 'bump'. Got {window!r}.")


def require_memory(needed: int, what: str, cure: str) -> None:
    """Raise MemoryError if the machine does not have as many bytes."""
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > held:
        gib = 2**30
        raise MemoryError(f"{what} {needed / gib:.1f} GiB. Got a machine of {held / gib:.1f} GiB; {cure}.")
