"""Command ``lightning-nested``.

This file imports nothing heavy: ``--help``, ``--version``, the list of configurations and errors about names come
at once. Lightning is loaded by the commands that need it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import lightning_nested
from lightning_nested.cli.find_configs import (
    PROGRAM,
    close_matches,
    resolve_config,
    resolve_configs,
    shipped_configs,
    shipped_rides,
)
from lightning_nested.extras import MissingExtraError, require_package


class Command(NamedTuple):
    """Subcommand: its line in ``--help``, and a function of the arguments from the command's own name on."""

    summary: str
    run: Callable[[list[str]], None]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 if the arguments are wrong.

    Args:
        args: Arguments after the program's name; None: those of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments:
        _fail("a command is missing")
    first = arguments[0]
    if first in ("-h", "--help", "help"):
        print(_help())
    elif first in ("-V", "--version"):
        print(PROGRAM, lightning_nested.__version__)
    elif first in COMMANDS or first.partition("=")[0] == "--print_shtab":
        try:
            COMMANDS.get(first, COMMANDS["fit"]).run(arguments)
        except MissingExtraError as error:
            _fail(str(error))
    elif first.startswith("-"):
        _fail(f"the first argument must be a command, --help or --version. Got {first!r}")
    else:
        _fail(f"no command is called {first!r}{close_matches(first, COMMANDS)}")


@contextmanager
def paused_collection() -> Iterator[None]:
    """Pause garbage collection, for imports.

    Importing Lightning makes a million objects that stay; searching them for garbage took a fifth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _errors_in_short() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        _fail(str(error))


def _run_lightning(arguments: list[str]) -> None:
    # Before the seconds that importing Lightning takes.
    with _errors_in_short():
        resolved = resolve_configs(arguments)
    require_package("jsonargparse", "tqdm")
    with paused_collection():
        from lightning_nested.cli.nested_cli import NestedCLI, import_classes

        import_classes()
    NestedCLI(args=resolved)


def _run_ride(arguments: list[str]) -> None:
    with _errors_in_short():
        resolved = resolve_configs(arguments[1:], shipped_rides())
    require_package("jsonargparse", "tqdm")
    with paused_collection():
        from lightning_nested.cli.ride import run_ride
    run_ride(resolved)


def _show_configs(arguments: list[str]) -> None:
    if len(arguments) > 2 or "-h" in arguments or "--help" in arguments:
        print(f"usage: {PROGRAM} configs [NAME]\n\nList the configurations of the package, or print one.")
        return
    shipped = shipped_configs() | shipped_rides()
    if len(arguments) == 2:
        with _errors_in_short():
            print(Path(resolve_config(arguments[1], shipped)).read_text(encoding="utf-8"), end="")
    else:
        width = max(map(len, shipped), default=0)
        for name, path in shipped.items():
            lines = path.read_text(encoding="utf-8").splitlines()
            comment = next((line for line in lines if line.startswith("#")), "")
            print(f"{name:<{width}}  {comment.lstrip('# ')}".rstrip())


COMMANDS: dict[str, Command] = {
    "fit": Command("train a model; its hyperparameters can be tuned in the same run", _run_lightning),
    "validate": Command("evaluate on the validation data", _run_lightning),
    "test": Command("evaluate on the test data", _run_lightning),
    "predict": Command("run the model on the prediction data", _run_lightning),
    "ride": Command("branch the training of a game and write its different solutions to files", _run_ride),
    "configs": Command("list the configurations that come with the package, or print one", _show_configs),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: {PROGRAM} [--help] [--version] COMMAND [OPTIONS]\n\n"
        f"{(lightning_nested.__doc__ or '').splitlines()[0]}\n\n"
        f"commands:\n{commands}\n\n"
        f"configurations for --config: {', '.join(shipped_configs())}\n"
        f"configurations for ride --config: {', '.join(shipped_rides())}\n\n"
        "Each class_path of a configuration imports and runs code: open only files that you trust.\n\n"
        f"examples:\n  {PROGRAM} fit --config digits --trainer.max_epochs 5\n"
        f"  {PROGRAM} fit --config clean_digits --trainer.callbacks.HypergradientCallback.every_n_steps 2\n"
        f"  {PROGRAM} fit --help"
    )


def _fail(message: str) -> NoReturn:
    print(f"{PROGRAM}: error: {message}\ntip: {PROGRAM} --help", file=sys.stderr)
    raise SystemExit(2)
