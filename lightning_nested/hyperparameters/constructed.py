"""Objects that print as the call that constructs them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any

from typing_extensions import Self


class Constructed:
    """Base of classes that print the arguments they were constructed with, those that differ from the defaults.

    >>> class Momentum(Constructed):
    ...     def __init__(self, beta=0.9, phase=0.0):
    ...         pass
    >>> Momentum(0.5, phase=0.0)
    Momentum(beta=0.5)
    """

    _given: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})

    # Not a wrapper of __init__: signatures, which the command line reads, stay those of the subclass.
    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: D102 - a magic method
        self = super().__new__(cls)
        # Copies and unpickled objects come here without arguments, and get theirs with the other attributes.
        self._given = args, kwargs
        return self

    def __repr__(self) -> str:
        args, kwargs = self._given
        signature = inspect.signature(type(self).__init__)
        try:
            given = signature.bind(self, *args, **kwargs)
        except TypeError:
            # printed before its arguments were refused
            return f"{type(self).__name__}(...)"
        pieces = []
        for name, value in list(given.arguments.items())[1:]:
            parameter = signature.parameters[name]
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                pieces += [_shown(item) for item in value]
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                pieces += [f"{key}={_shown(item)}" for key, item in value.items()]
            elif not _same(value, parameter.default):
                pieces.append(f"{name}={_shown(value)}")
        return f"{type(self).__name__}({', '.join(pieces)})"


def _same(value: object, default: object) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))


def _shown(value: object) -> str:
    """Return the text of a value: a class or function of a module by its name, which can be evaluated."""
    if (
        isinstance(value, type | types.FunctionType | types.BuiltinFunctionType)
        and value.__name__ != "<lambda>"
    ):
        return value.__name__
    return repr(value)
