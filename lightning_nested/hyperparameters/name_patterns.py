"""Names of parameters that users give with wildcards."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return True if a pattern, with ``*`` wildcards, matches the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(patterns: Iterable[str], names: Collection[str]) -> None:
    """Refuse a pattern of ``include`` or ``exclude`` that matches none of the names of parameters."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            raise ValueError(
                f"include and exclude must match parameter names. Got {pattern!r}, which matches none; "
                f"close names: {', '.join(close) or ', '.join(list(names)[:5])}."
            )
