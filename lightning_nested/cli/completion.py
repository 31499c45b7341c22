"""Scripts by which a shell completes commands, options, names of classes and of configurations."""

from __future__ import annotations

import argparse
import collections.abc
import inspect
import re
import types
from collections.abc import Iterable, Iterator
from enum import Enum
from importlib import import_module
from typing import Any, Literal, Union, get_args, get_origin

from lightning_nested.cli.find_configs import PROGRAM, shipped_configs, shipped_rides
from lightning_nested.cli.messages import parameter_names, subclasses


def shells() -> list[str]:
    """Return the shells that there are scripts for; needs shtab."""
    return list(import_module("shtab").SUPPORTED_SHELLS)


def completion_script(parsers: dict[str, argparse.ArgumentParser], shell: str) -> str:
    """Return the script of a shell.

    Only one level of a class is completed: the names of its subclasses, and their own options. jsonargparse's
    script goes through all levels, and a network that takes networks has no last one.

    Args:
        parsers: Parser of each command.
        shell: One of :func:`shells`.
    """
    shtab = import_module("shtab")
    parser = argparse.ArgumentParser(prog=PROGRAM)
    parser.add_argument("-V", "--version", action="store_true", help="Print the version.")
    commands = parser.add_subparsers()
    names = {"configs": [*shipped_configs()], "rides": [*shipped_rides()]}
    for command, given in parsers.items():
        plain = commands.add_parser(command, add_help=False, help=_short(given.description))
        config = _config_names("rides" if command == "ride" else "configs", names, shtab.FILE)
        _copy_options(given, plain, config)
    listing = commands.add_parser("configs", help="List the configurations, or print one.")
    listing.add_argument("name", nargs="?", choices=[*names["configs"], *names["rides"]])
    script: str = shtab.complete(parser, shell, preamble=_preambles(names))
    return script


def _config_names(kind: str, names: dict[str, list[str]], files: dict[str, str]) -> dict[str, str]:
    """Return what completes ``--config``: the package's names, and files where a shell takes both."""
    function = f"_lightning_nested_{kind}"
    # tcsh looks up an option without its command.
    words = " ".join(name for known in names.values() for name in known)
    return {**files, "bash": function, "zsh": function, "tcsh": f"({words})"}


def _preambles(names: dict[str, list[str]]) -> dict[str, str]:
    bash = (
        f'_lightning_nested_{kind}() {{ compgen -W "{" ".join(known)}" -- "$1"; compgen -f -- "$1"; }}'
        for kind, known in names.items()
    )
    zsh = (
        f"_lightning_nested_{kind}() {{ _alternative 'names:name:({' '.join(known)})' 'files:file:_files'; }}"
        for kind, known in names.items()
    )
    return {"bash": "\n".join(bash), "zsh": "\n".join(zsh)}


def _copy_options(
    given: argparse.ArgumentParser, plain: argparse.ArgumentParser, config: dict[str, str]
) -> None:
    """Add the options of a parser to one of argparse, then those of the classes that they take."""
    known: set[str] = set()
    visible = [a for a in given._actions if a.option_strings and a.help != argparse.SUPPRESS]
    # An option that takes a class has one to show the class's help.
    takes_class = {s.removesuffix(".help") for a in visible for s in a.option_strings if s.endswith(".help")}
    of_classes: dict[str, str] = {}
    for action in visible:
        # `--OPTION+`, which appends to a list, comes after it, short forms before.
        option = next(s for s in action.option_strings if s.startswith("--"))
        typehint, shows_help = getattr(action, "_typehint", None), option.endswith(".help")
        classes = list(_classes(typehint)) if shows_help or option in takes_class else []
        words = [
            *(action.choices or ([] if shows_help else _words(typehint))),
            *(c.__name__ for c in classes),
        ]
        settings = {"choices": list(dict.fromkeys(words)) or None} if action.nargs != 0 else {"nargs": 0}
        added = plain.add_argument(
            *action.option_strings, action=_Copied, help=_short(action.help), **settings
        )
        known.update(action.option_strings)
        if "--config" in action.option_strings:
            added.complete = config  # type: ignore[attr-defined]
        of_classes |= {} if shows_help else _class_options(option, classes)
    for option, text in of_classes.items():
        if option not in known:
            plain.add_argument(option, help=text)


class _Copied(argparse.Action):
    """Option that is never parsed."""


def _class_options(option: str, classes: Iterable[type]) -> dict[str, str]:
    """Return the options of these classes with a word of help."""
    found: dict[str, str] = {}
    for cls in classes:
        for name in parameter_names(cls):
            found[f"{option}.{name}"] = f"of {cls.__name__}"
            if option == "--trainer.callbacks":
                found[f"{option}.{cls.__name__}.{name}"] = f"of {cls.__name__}"
    return found


def _parts(typehint: Any) -> Iterator[Any]:
    """Yield the types that a type is put together from."""
    if get_origin(typehint) in (Union, types.UnionType, list, collections.abc.Iterable):
        for part in get_args(typehint):
            yield from _parts(part)
    elif get_origin(typehint) is collections.abc.Callable:
        # A class is given where it is called later.
        yield from _parts(get_args(typehint)[-1])
    else:
        yield typehint


def _words(typehint: Any) -> Iterator[str]:
    """Yield the values that a type spells out."""
    for part in _parts(typehint):
        if part is bool:
            yield from ("true", "false")
        elif get_origin(part) is Literal:
            yield from map(str, get_args(part))
        elif isinstance(part, type) and issubclass(part, Enum):
            yield from part.__members__


def _classes(typehint: Any) -> Iterator[type]:
    """Yield the classes whose objects a type allows, those that have been imported."""
    for part in _parts(typehint):
        if isinstance(part, type) and part.__module__ != "builtins":
            yield from (cls for cls in (part, *subclasses(part)) if not inspect.isabstract(cls))


def _short(text: str | None) -> str:
    """Return the first sentence of a help text, for argparse, which fills in after %."""
    return re.split(r"(?<=\.)\s", " ".join((text or "").split()))[0].replace("%", "%%")
