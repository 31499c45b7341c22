"""Loggers that look like the run's own to the code that reads them, and write nothing."""

from __future__ import annotations

from os import PathLike
from typing import Any

# What an attribute may be handed out as: it cannot write.
_PLAIN = (str, bytes, int, float, complex, bool, type(None), PathLike, tuple, frozenset)


class SilentLogger:
    """Stand-in for a logger or its experiment, of the same class as far as ``isinstance`` knows.

    Names, folders and versions are those of the original. Methods do nothing and return None, except those whose names
    begin with ``get``. Other attributes, such as ``experiment``, are silent too.

    >>> from lightning.pytorch.loggers import CSVLogger
    >>> logger = CSVLogger("folder", name="run", version=3)
    >>> silent = SilentLogger(logger)
    >>> silent.log_metrics({"loss": 1.0}), isinstance(silent, CSVLogger), silent.log_dir == logger.log_dir
    (None, True, True)
    """

    def __init__(self, original: object) -> None:
        self.__dict__["_original"] = original

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        kind: type = self._original.__class__
        return kind

    def __getattr__(self, name: str) -> Any:
        if self._original is None:
            return self
        value = getattr(self._original, name)
        if isinstance(value, _PLAIN) or (callable(value) and name.startswith("get")):
            return value
        return SilentLogger(value)

    def __setattr__(self, name: str, value: object) -> None:
        """Set nothing."""

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Do nothing."""

    def __getitem__(self, key: object) -> Any:
        return SilentLogger(None)

    def __setitem__(self, key: object, value: object) -> None:
        """Set nothing."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave exceptions alone."""
