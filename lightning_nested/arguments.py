"""Checks of arguments: of their kind, by the annotations of a constructor or function; of their range, by name.

Annotations are the one place that says of which kind an argument is. Whole numbers may be NumPy's; a list may stand for
a tuple, as YAML has no tuples; a number may be a tensor of one element. NaN and infinity are no numbers here, and
True is no count.
"""

from __future__ import annotations

import cmath
import collections.abc as abc
import dataclasses
import functools
import inspect
import math
import numbers
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


class ArgumentKindError(ValueError, TypeError):
    """Raised for an argument of a wrong kind: a TypeError to Python, a ValueError like other refusals here."""


class Kind(NamedTuple):
    """Condition that an annotation sets, and words for it that follow "must be"."""

    fits: Callable[[Any], bool]
    words: str


def checked(target: T) -> T:
    """Refuse arguments of a wrong kind in calls of this function, or in the constructor of this class.

    Only arguments that are given are looked at. A class whose constructor calls ``save_hyperparameters``, which reads
    the frames of constructors, calls :func:`check` in its constructor instead.

    Example:
        >>> @checked
        ... def repeat(word: str, times: int = 2) -> str:
        ...     return word * times
        >>> repeat("ab", 2.5)
        Traceback (most recent call last):
        ...
        lightning_nested.arguments.ArgumentKindError: times must be a whole number. Got 2.5.
    """
    if isinstance(target, type):
        target.__init__ = _wrapped(target.__init__, functools.partial(_hints_of_class, target))  # type: ignore[misc]
        return target
    return typing.cast("T", _wrapped(target, functools.partial(_hints, target)))


def check(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Refuse values of a wrong kind for the parameters of ``function``; names that it does not have are left out.

    Raises:
        ArgumentKindError: It names the first one.
    """
    _check(_kinds(function), values)


def at_least(least: float, /, **values: Any) -> None:
    """Refuse the first of these numbers, or lists or mappings of numbers, that is less; None is allowed.

    Raises:
        ValueError: It names the number.
    """
    _refuse(values, lambda v: v >= least, f"be at least {least}")


def positive(**values: Any) -> None:
    """Refuse the first of these numbers that is not above 0, or infinite; see :func:`at_least`.

    Raises:
        ValueError: It names the number.
    """
    _refuse(values, lambda v: 0 < v < math.inf, "be positive")


def fraction(**values: Any) -> None:
    """Refuse the first of these numbers that does not lie in [0, 1); see :func:`at_least`.

    Raises:
        ValueError: It names the number.
    """
    _refuse(values, lambda v: 0 <= v < 1, "lie in [0, 1)")


def within(least: float, most: float, /, **values: Any) -> None:
    """Refuse the first of these numbers that lies outside of the closed interval; see :func:`at_least`.

    Raises:
        ValueError: It names the number.
    """
    _refuse(values, lambda v: least <= v <= most, f"lie in [{least}, {most}]")


def _refuse(values: Mapping[str, Any], fits: Callable[[Any], bool], condition: str) -> None:
    for name, value in values.items():
        held = value.values() if isinstance(value, Mapping) else value
        # A tensor of one number is iterable to Python, until it is asked for its items.
        several = isinstance(held, Iterable) and getattr(held, "ndim", 1) > 0
        if value is not None and not all(map(fits, held if several else [held])):
            raise ValueError(f"{name} must {condition}. Got {shown(value)}.")


def shown(value: Any) -> str:
    """Return ``value`` for an error message, in short."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if getattr(value, "shape", None):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value) if isinstance(value, str) else reprlib.repr(value)
    return (
        text
        if "\n" not in text and " object at 0x" not in text
        else f"an object of type {type(value).__name__}"
    )


def _wrapped(function: Callable[..., Any], hints: Callable[[], dict[str, Any]]) -> Callable[..., Any]:
    signature = inspect.signature(function)
    # the name of **kwargs
    variable = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @functools.cache
    def kinds() -> dict[str, Kind]:
        return {name: kind_of(hint) for name, hint in hints().items()}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            # Python's own error of this call says what is missing or too much.
            return function(*args, **kwargs)
        _check(kinds(), given | given.get(variable, {}))
        return function(*args, **kwargs)

    return call


@functools.cache
def _kinds(function: Callable[..., Any]) -> dict[str, Kind]:
    return {name: kind_of(hint) for name, hint in _hints(function).items()}


def _check(kinds: Mapping[str, Kind], values: Mapping[str, Any]) -> None:
    for name, kind in kinds.items():
        if name in values and not kind.fits(values[name]):
            value = values[name]
            raise ArgumentKindError(f"{name} must be {kind.words}. Got {shown(value)}{_cure(kind, value)}.")


def _cure(kind: Kind, value: Any) -> str:
    if isinstance(value, type):
        return "; give an instance"
    if not kind.fits([value]):
        return ""
    return f"; write [{value!r}]" if isinstance(value, str) else "; give a list of it"


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return annotations by parameter, those of ``**options: Unpack[...]`` too, without ``*args``."""
    module = inspect.unwrap(function).__module__
    hints = {}
    for p in inspect.signature(function).parameters.values():
        hint = _resolved(p.annotation, module)
        if p.kind is inspect.Parameter.VAR_KEYWORD:
            for options in typing.get_args(hint):
                hints.update(
                    {k: _resolved(v, options.__module__) for k, v in options.__annotations__.items()}
                )
        elif p.kind is not inspect.Parameter.VAR_POSITIONAL:
            hints[p.name] = hint
    return hints


def _hints_of_class(cls: type) -> dict[str, Any]:
    names = inspect.signature(cls).parameters
    if not dataclasses.is_dataclass(cls):
        return _hints(vars(cls)["__init__"])
    # A field's annotation can only be read in the module of the class that declares it.
    declared = {
        name: _resolved(hint, base.__module__)
        for base in reversed(cls.__mro__)
        for name, hint in inspect.get_annotations(base).items()
    }
    return {name: declared[name] for name in names}


def _resolved(hint: Any, module: str) -> Any:
    if isinstance(hint, typing.ForwardRef):
        hint = hint.__forward_arg__
    try:
        return _resolved(eval(hint, vars(sys.modules[module])), module) if isinstance(hint, str) else hint
    except (NameError, TypeError):  # imported for the type checker only, or a quoted alias with parameters
        return Any


@functools.cache
def kind_of(hint: Any) -> Kind:
    """Return what an annotation allows; what cannot be decided from it is allowed."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is typing.Annotated:
        return kind_of(args[0])
    if isinstance(hint, TypeVar):
        return kind_of(_resolved(hint.__bound__, hint.__module__)) if hint.__bound__ else _ANY
    if origin is typing.Literal:
        return Kind(lambda v: any(type(v) is type(a) and v == a for a in args), _either(map(repr, args)))
    if origin in (typing.Union, types.UnionType):
        return _union([kind_of(a) for a in args])
    cls = origin or hint
    if cls is abc.Callable:
        return Kind(callable, "a function or another callable")
    if not isinstance(cls, type) or (
        getattr(cls, "_is_protocol", False) and cls.__module__ != "collections.abc"
    ):
        return _ANY
    if issubclass(cls, str | bytes) or not issubclass(cls, abc.Iterable) or not args:
        name = cls.__name__
        return Kind(lambda v: isinstance(v, cls), f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")
    if issubclass(cls, abc.Mapping):
        keys, items = map(kind_of, args)
        return Kind(lambda v: _is_mapping(v, keys, items), f"a mapping of {keys.words} to {items.words}")
    return _sequence(cls, args)


def _union(kinds: list[Kind]) -> Kind:
    # A number comes last: to ask whether a tensor is one, it must be read.
    ordered = sorted(kinds, key=lambda kind: kind is _NUMBER)
    return Kind(lambda v: any(kind.fits(v) for kind in ordered), _either(k.words for k in kinds))


def _sequence(cls: type, args: tuple[Any, ...]) -> Kind:
    if cls is tuple and args[-1] is not Ellipsis:
        each = [kind_of(a) for a in args]
        return Kind(
            lambda v: (
                (items := _items(cls, v)) is not None
                and len(items) == len(each)
                and all(k.fits(i) for k, i in zip(each, items, strict=True))
            ),
            f"a list of {len(each)}: {', '.join(k.words for k in each)}",
        )
    kind = kind_of(args[0])
    return Kind(
        lambda v: (
            isinstance(v, abc.Iterator)
            or ((items := _items(cls, v)) is not None and all(map(kind.fits, items)))
        ),
        f"a list{_each(kind.words)}",
    )


def _either(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _each(words: str) -> str:
    single = re.fullmatch(r"an? ([\w ]+)", words)
    return f" of {single[1]}s" if single and " or " not in words else f", each {words}"


def _items(cls: type, value: Any) -> list[Any] | None:
    """Return the entries of an ordered collection, or of an array that need not be a tuple; None: it is neither."""
    if hasattr(value, "tolist") and cls is not tuple:
        value = value.tolist()
    unordered = (str, bytes, type, abc.Mapping, abc.Set)
    if (
        isinstance(value, unordered)
        or hasattr(value, "tolist")
        or not (hasattr(value, "__len__") and hasattr(value, "__iter__"))
    ):
        return None
    return list(value)


def _is_mapping(value: Any, keys: Kind, items: Kind) -> bool:
    return isinstance(value, abc.Mapping) and all(keys.fits(k) and items.fits(v) for k, v in value.items())


def is_whole(value: Any) -> bool:
    """Return True for a whole number of Python or NumPy; bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return True for a finite real number, also NumPy's or a detached tensor of one element; bool is none."""
    if (
        isinstance(value, bool | type)
        or not hasattr(value, "__float__")
        or getattr(value, "requires_grad", False)
    ):
        return False
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False


_ANY = Kind(lambda _: True, "any object")
_NUMBER = Kind(is_number, "a finite number")
_PLAIN: dict[Any, Kind] = {
    Any: _ANY,
    object: _ANY,
    inspect.Parameter.empty: _ANY,
    None: Kind(lambda v: v is None, "None"),
    type(None): Kind(lambda v: v is None, "None"),
    bool: Kind(lambda v: isinstance(v, bool) or type(v).__name__ in ("bool_", "bool"), "True or False"),
    int: Kind(is_whole, "a whole number"),
    float: _NUMBER,
    complex: Kind(
        lambda v: is_number(v) or (isinstance(v, complex) and cmath.isfinite(v)), "a finite complex number"
    ),
    str: Kind(lambda v: isinstance(v, str), "a string"),
}
