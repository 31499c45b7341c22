"""Checks of arguments that several classes of this package share."""

from __future__ import annotations

import os


def require_memory(needed: int, what: str, cure: str) -> None:
    """Raise MemoryError if the machine does not have as many bytes."""
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > held:
        gib = 2**30
        raise MemoryError(f"{what} {needed / gib:.1f} GiB. Got a machine of {held / gib:.1f} GiB; {cure}.")
