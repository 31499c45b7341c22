"""Replace attributes of an object for a while."""

from __future__ import annotations


class StandIns:
    """Attributes of objects that are replaced until :meth:`put_back`.

    >>> from torch import nn
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
        self._replaced: list[tuple[object, str, object]] = []

    def put(self, owner: object, name: str, value: object) -> None:
        """Replace an attribute of the instance; the value may hide an attribute of the class."""
        self._replaced.append((owner, name, owner.__dict__.get(name, self._ABSENT)))
        owner.__dict__[name] = value

    def put_back(self) -> None:
        """Restore every attribute, the last one first."""
        while self._replaced:
            owner, name, value = self._replaced.pop()
            if value is self._ABSENT:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value
