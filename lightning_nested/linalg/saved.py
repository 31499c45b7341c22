"""Check of a saved state before it is read: a key that lacks is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def require_keys(state: Mapping[str, Any], keys: Iterable[str], owner: str) -> None:
    """Refuse a saved state without all of ``keys``; ``owner`` names whose state it is.

    Raises:
        ValueError: It names the keys that lack.

    >>> require_keys({"steps": 3}, ["steps", "windows"], "LyapunovCallback")
    Traceback (most recent call last):
        ...
    ValueError: The saved state of LyapunovCallback must have 'windows'. Got 'steps': the checkpoint is damaged, or
    another version or class wrote it; start without it.
    """
    missing = [key for key in keys if key not in state]
    if missing:
        wanted, got = (", ".join(repr(key) for key in names) for names in (missing, state))
        raise ValueError(
            f"The saved state of {owner} must have {wanted}. Got {got or 'nothing'}: the checkpoint is damaged, or "
            "another version or class wrote it; start without it."
        )
