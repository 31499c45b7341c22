"""Options of one callback among several: ``--trainer.callbacks.CLASS.OPTION VALUE``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from lightning_nested.cli.find_configs import close_matches

# Class names begin with a capital letter, options do not.
_OPTION = re.compile(
    r"--trainer\.callbacks\.(?P<name>[A-Z]\w*)\.(?P<path>[^=]+)(?:=(?P<value>.*))?", re.DOTALL
)

Change = tuple[str, str, str]
"""Class, dotted option and value."""


def callback_options(arguments: Sequence[str]) -> tuple[list[str], list[Change]]:
    """Split arguments into those of the parser and changes of a callback's options.

    Example:
        >>> callback_options(["fit", "--trainer.callbacks.GeneratorEMA.decay", "0.9"])
        (['fit'], [('GeneratorEMA', 'decay', '0.9')])
    """
    rest: list[str] = []
    changes: list[Change] = []
    remaining = iter(arguments)
    for argument in remaining:
        found = _OPTION.fullmatch(argument)
        if found is None:
            rest.append(argument)
        else:
            value = found["value"] if found["value"] is not None else next(remaining, "")
            changes.append((found["name"], found["path"].removeprefix("init_args."), value))
    return rest, changes


def with_callback_options(parser: ArgumentParser, config: Namespace, changes: Sequence[Change]) -> Any:
    """Return the configuration with these options changed, parsed again; a wrong one ends the program."""
    command = config.get("subcommand")
    trainer = (config[command] if command else config).trainer
    callbacks = trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    names = [callback.class_path.rpartition(".")[2] for callback in callbacks]
    for name, path, value in changes:
        if names.count(name) != 1:
            known = ", ".join(names) or "none"
            parser.error(
                f"--trainer.callbacks.{name} must name one of the run's callbacks. Got {names.count(name)} of it among "
                f"{known}{close_matches(name, names) if name not in names else ''}"
            )
        _change(callbacks[names.index(name)], path.split("."), yaml.safe_load(value))
    return parser.parse_object(config)


def _change(entry: Any, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        entry = _inside(entry)
        if not isinstance(entry.get(key), Namespace):
            entry[key] = Namespace()  # type: ignore[no-untyped-call]
        entry = entry[key]
    _inside(entry)[keys[-1]] = value


def _inside(entry: Namespace) -> Any:
    """Return where the options of a class are; short names leave ``init_args`` out."""
    if "class_path" not in entry:
        return entry
    if "init_args" not in entry:
        entry["init_args"] = Namespace()  # type: ignore[no-untyped-call]
    return entry["init_args"]
