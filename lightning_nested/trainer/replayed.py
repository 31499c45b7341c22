"""An iterator whose items can be given back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any


class Replayed(Iterator[Any]):
    """Iterator over the items of another one, which an evaluation may take without anyone missing them.

    >>> items = Replayed(iter("abc"))
    >>> items.begin()
    >>> next(items), next(items)
    ('a', 'b')
    >>> items.give_back()
    >>> list(items)
    ['a', 'b', 'c']
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._ahead: deque[Any] = deque()
        # Items taken since each open `begin`.
        self._taken: list[list[Any]] = []

    def __next__(self) -> Any:
        item = self._ahead.popleft() if self._ahead else next(self._source)
        if self._taken:
            self._taken[-1].append(item)
        return item

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_source"], name)

    def begin(self) -> None:
        """Remember the items that are taken from now on."""
        self._taken.append([])

    def give_back(self) -> None:
        """Return to where the last :meth:`begin` was."""
        self._ahead.extendleft(reversed(self._taken.pop()))
