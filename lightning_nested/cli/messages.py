"""Errors of the command line in short: the innermost cause, the options that exist, close matches."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger

from lightning_nested.cli.find_configs import close_matches, shipped_configs

# A class can be given by its short name once it has been imported.
PACKAGES = (
    "callbacks",
    "datamodules",
    "demos",
    "dynamics",
    "games",
    "hypergradient",
    "hypernetworks",
    "hyperparameters",
    "modules",
    "networks",
    "optim",
)
_BASES = (
    LightningModule,
    LightningDataModule,
    Callback,
    Logger,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
)

# Lines of an error of jsonargparse that name a cause, not the attempts around it.
_CAUSES = (
    r"Option '(?P<option>[^']+)' is not accepted",
    r"Expected a dot import path string: (?P<name>\S+)",
    r"Expected a <class '(?P<kind>[^']+)'>\. Got value: (?P<value>.*)",
    r"module '(?P<module>[^']+)' has no attribute '(?P<attribute>[^']+)'",
    # of a plain value that may be None, too
    r"^Given value: (?P<given>.*)",
)
_PLAIN = r"Subtypes: \[<class '(?P<kind>bool|int|float|str)'>, <class 'NoneType'>\]"


class Cause(NamedTuple):
    """Innermost cause: its line, the keys and the class that it stands in, and the classes that would do there."""

    match: re.Match[str]
    keys: tuple[str, ...]
    owner: str
    expected: str


def explained(message: str, parser: argparse.ArgumentParser, configs: Sequence[str] = ()) -> str:
    """Return an error of jsonargparse in short, with close matches and, where something is missing, a cure."""
    cause = innermost(message)
    lines = [message] if cause is None else list(_told(cause))
    hints = dict.fromkeys(_hints(message, cause, parser, configs))
    return "\n".join([*lines, *hints])


def innermost(message: str) -> Cause | None:
    """Return the cause that stands deepest in an error of jsonargparse, the first of several; None: none is known."""
    best: tuple[int, Cause] | None = None
    around: list[tuple[int, str, str]] = []
    expected: list[tuple[int, str]] = []
    for line in message.splitlines():
        text = line.lstrip(" -")
        if not text:
            continue
        depth = len(line) - len(text)
        around = [entry for entry in around if entry[0] < depth]
        expected = [entry for entry in expected if entry[0] <= depth]
        if key := re.match(r'Parser key "([^"]+)"', text):
            around.append((depth, "key", key[1]))
            expected.clear()
        elif given := re.match(r"Problem with given class_path '([^']+)'", text):
            around.append((depth, "class", given[1]))
        elif text.startswith("Subtypes: "):
            expected.append((depth, text))
        for pattern in _CAUSES:
            if (match := re.search(pattern, text)) and (best is None or depth > best[0]):
                if text.startswith("Given value: ") and not (expected and re.match(_PLAIN, expected[-1][1])):
                    continue
                keys = tuple(value for _, what, value in around if what == "key")
                owner = next((value for _, what, value in reversed(around) if what == "class"), "")
                later = re.search(r"Got value: Namespace\(class_path='([^']+)'", text)
                cause = Cause(match, keys, later[1] if later else owner, expected[-1][1] if expected else "")
                best = depth, cause
    return None if best is None else best[1]


def _told(cause: Cause) -> Iterator[str]:
    found, where = cause.match.groupdict(), ".".join(cause.keys) or "arguments"
    if option := found.get("option"):
        owner = cause.owner.rpartition(".")[2]
        option = option.partition(".")[0]
        yield (
            f"{where}: {owner} has no option {option!r}."
            if owner
            else f"{where}: there is no option {option!r}."
        )
        if cause.owner:
            yield f"Options of {owner}: {', '.join(_parameter_names(cause.owner)) or 'none'}."
    elif name := found.get("name"):
        yield f"{where}: no class is called {name!r}; give a short name or an import path."
    elif kind := found.get("kind"):
        yield f"{where} must be of type {kind}. Got {found['value']}."
    elif (given := found.get("given")) is not None:
        kind = re.sub(_PLAIN, r"\g<kind>", cause.expected)
        yield f"{where} must be of type {kind}. Got {given}."
    else:
        yield f"{where}: module {found['module']!r} has no attribute {found['attribute']!r}."


def _hints(
    message: str, cause: Cause | None, parser: argparse.ArgumentParser, configs: Sequence[str]
) -> Iterator[str]:
    for word, known in _unknown_words(message, cause, parser):
        question = close_matches(word, known)
        if question:
            yield f"{word}{question.replace('. Did', ': did')}"
        elif cause and cause.keys[-1:] == ("trainer.callbacks",) and cause.match.groupdict().get("option"):
            yield from _of_another_callback(word)
    if "arguments are required" in message and "model" in message:
        yield from _needed_before(configs)
        yield "Give a configuration (--config NAME, see `lightning-nested configs`) or --model CLASS."


def _of_another_callback(option: str) -> Iterator[str]:
    """Name callbacks of this package that have such an option: --trainer.callbacks.OPTION is about the last one."""
    for name in import_module("lightning_nested.callbacks").__all__:
        path = f"lightning_nested.callbacks.{name}"
        if issubclass(getattr(import_module("lightning_nested.callbacks"), name), Callback):
            close = close_matches(option, _parameter_names(path))
            if close:
                match = close.removeprefix(". Did you mean ").removesuffix("?").split(" or ")[0]
                yield f"{option}: did you mean --trainer.callbacks.{name}.{match}?"


def _needed_before(configs: Sequence[str]) -> Iterator[str]:
    """Say for a configuration that changes another one ("# After NAME") which must stand before it."""
    for config in configs:
        if Path(config).is_file():
            after = re.match(r"# After (\w+)", Path(config).read_text(encoding="utf-8"))
            if after and after[1] in shipped_configs():
                name = Path(config).stem
                yield f"{name} changes the configuration {after[1]}: give --config {after[1]} --config {name}."


def _unknown_words(
    message: str, cause: Cause | None, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield the unknown options, classes and arguments that an error names, with the known ones."""
    options = list(_option_strings(parser))
    for unrecognized in re.findall(r"unrecognized arguments: (.*)", message):
        for option in re.findall(r"(?:^|\s)(--[^\s=]+)", unrecognized):
            yield option, options
    for key in re.findall(r"does not accept option '([^']+)'", message):
        yield key, [option.removeprefix("--") for option in options]
    if cause is None:
        return
    found = cause.match.groupdict()
    if (option := found.get("option")) and cause.owner:
        yield option.partition(".")[0], _parameter_names(cause.owner)
    elif name := found.get("name"):
        yield name, _class_names(cause.expected)
    elif attribute := found.get("attribute"):
        yield attribute, dir(import_module(found["module"]))


def _option_strings(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        # Subcommands.
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                yield from _option_strings(subparser)


def _class_names(expected: str) -> set[str]:
    """Return short names of the classes that ``expected``, a list of types in words, allows; all if it names none."""
    loaded = {cls for base in _BASES for cls in subclasses(base)}
    for package in PACKAGES:
        public = vars(import_module(f"lightning_nested.{package}"))
        loaded |= {v for v in public.values() if isinstance(v, type)}
    bases = tuple(filter(None, map(_class_of, re.findall(r"[A-Za-z_][\w.]*\.[\w.]*\w", expected))))
    return {cls.__name__ for cls in loaded if not bases or issubclass(cls, bases)}


def _class_of(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:
        return None
    ours = isinstance(found, type) and not module.startswith(("collections", "typing"))
    return found if ours else None


def subclasses(base: type) -> Iterator[type]:
    """Yield the classes below a class that have been imported, except private ones and what is below those."""
    below: list[type] = base.__subclasses__()
    for cls in below:
        if not cls.__name__.startswith("_"):
            yield cls
            yield from subclasses(cls)


def _parameter_names(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return parameter_names(getattr(import_module(module), name))


def parameter_names(cls: type) -> list[str]:
    """Return the options of a class and, where it passes options on, of its bases, in their order."""
    names: dict[str, None] = {}
    for owner in cls.__mro__:
        if "__init__" in vars(owner) and owner is not object:
            parameters = inspect.signature(vars(owner)["__init__"]).parameters
            names.update(dict.fromkeys(parameters))
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    return [
        name for name in names if name not in ("self", "args", "kwargs", "options", "game", "game_options")
    ]
