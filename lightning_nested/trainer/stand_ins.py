"""Replace attributes of an object for a while."""

from __future__ import annotations

from torch import nn


class StandIns:
    """Attributes of modules that are replaced until :meth:`put_back`.

    >>> module, stand_ins = nn.Linear(1, 1), StandIns()
    >>> stand_ins.put(module, "forward", lambda x: x)
    >>> module.forward(3)
    3
    >>> stand_ins.put_back()
    >>> "forward" in vars(module)
    False
    """

    _ABSENT = object()

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, str, object]] = []

    def put(self, module: nn.Module, name: str, value: object) -> None:
        """Replace an attribute of the instance; the value may hide an attribute of the class."""
        self._replaced.append((module, name, module.__dict__.get(name, self._ABSENT)))
        module.__dict__[name] = value

    def put_back(self) -> None:
        """Restore every attribute, the last one first."""
        while self._replaced:
            module, name, value = self._replaced.pop()
            if value is self._ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value
