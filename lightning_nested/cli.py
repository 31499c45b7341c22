"""The ``lightning-nested`` command.

This file imports nothing heavy: ``--help``, ``--version``, the list of configurations and a misspelt name
answer at once. Lightning is loaded when a command runs that needs it.
"""

from __future__ import annotations

import difflib
import gc
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import lightning_nested

CONFIG_FOLDER = Path(__file__).parent / "configs"
_PROGRAM = "lightning-nested"


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        summary: its line in ``--help``.
        run: called with the arguments from the command's own name on.
    """

    summary: str
    run: Callable[[list[str]], None]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: arguments after the program's name; ``None`` for those of the process.

    Raises:
        SystemExit: with status 2 if the arguments are wrong.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments:
        _fail("a command is missing")
    first = arguments[0]
    if first in ("-h", "--help", "help"):
        print(_help())
    elif first in ("-V", "--version"):
        print(_PROGRAM, lightning_nested.__version__)
    elif first in COMMANDS:
        COMMANDS[first].run(arguments)
    elif first.startswith("-"):
        _fail(f"the first argument must be a command, --help or --version. Got {first!r}")
    else:
        _fail(f"no command is called {first!r}{close_matches(first, COMMANDS)}")


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    return {path.stem: path for path in sorted(CONFIG_FOLDER.glob("*.yaml"))}


def shipped_rides() -> dict[str, Path]:
    """The configurations of ``ride``, by name."""
    return {path.stem: path for path in sorted((CONFIG_FOLDER / "ride").glob("*.yaml"))}


def resolve_config(value: str, shipped: dict[str, Path] | None = None) -> str:
    """The file that ``--config value`` means.

    An existing file is taken as it is, else a shipped configuration of that name, with or without ``.yaml``.
    What cannot be such a name (an address, a folder's file, YAML text) is left to the parser.

    Raises:
        ValueError: for a name that is neither (with close matches and all names).

    Example:
        >>> Path(resolve_config("digits")).name
        'digits.yaml'
    """
    shipped = shipped_configs() if shipped is None else shipped
    name = re.sub(r"\.ya?ml$", "", value)
    if Path(value).is_file() or not re.fullmatch(r"[\w.-]+", value):
        return value
    if name not in shipped:
        for command, names in (("ride", shipped_rides()), ("fit", shipped_configs())):
            if name in names:
                raise ValueError(
                    f"`--config {name}` belongs to another command: {_PROGRAM} {command} --config {name}"
                )
        raise ValueError(
            f"`--config` must be a file or a configuration of the package ({', '.join(shipped)}). "
            f"Got {value!r}{close_matches(name, shipped)}"
        )
    return str(shipped[name])


def resolve_configs(arguments: Iterable[str], shipped: dict[str, Path] | None = None) -> list[str]:
    """The arguments with the value of each ``--config`` resolved, in any of the forms argparse accepts.

    Raises:
        ValueError: as ``resolve_config``.
    """
    resolved: list[str] = []
    expects_value = False
    for argument in arguments:
        joined = re.match(r"(--config=|-c=?)(?=[^-=])", argument)
        if expects_value:
            resolved.append(resolve_config(argument, shipped))
        elif joined:
            resolved.append(joined[0] + resolve_config(argument[joined.end() :], shipped))
        else:
            resolved.append(argument)
        expects_value = not expects_value and argument in ("-c", "--config")
    return resolved


def close_matches(word: str, known: Iterable[str]) -> str:
    """A question to end an error with, or nothing if no known word is close or begins with this one.

    Example:
        >>> close_matches("digit", ["digits", "cifar10"])
        '. Did you mean digits?'
    """
    # Compared without case: `imageclassifier` is one slip away from `ImageClassifier`, not two.
    by_lower = {name.lower(): name for name in known}
    begins = [name for name in by_lower if len(word) > 2 and name.startswith(word.lower())]
    close = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6)
    names = [by_lower[name] for name in dict.fromkeys([*begins[:3], *close])]
    return f". Did you mean {' or '.join(names[:3])}?" if names else ""


@contextmanager
def paused_collection() -> Iterator[None]:
    """For imports: no garbage is looked for meanwhile.

    Importing Lightning makes a million objects that stay. Looking for garbage among them, time and again, took a
    fifth of the time and found none.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _run_lightning(arguments: list[str]) -> None:
    try:  # before the seconds that importing Lightning takes
        resolved = resolve_configs(arguments)
    except ValueError as error:
        _fail(str(error))
    with paused_collection():
        from lightning_nested.nested_cli import NestedCLI, import_classes

        import_classes()
    NestedCLI(args=resolved)


def _run_ride(arguments: list[str]) -> None:
    try:
        resolved = resolve_configs(arguments[1:], shipped_rides())
    except ValueError as error:
        _fail(str(error))
    with paused_collection():
        from lightning_nested.ride_cli import run_ride  # torch, but not Lightning
    run_ride(resolved)


def _show_configs(arguments: list[str]) -> None:
    if len(arguments) > 2 or "-h" in arguments or "--help" in arguments:
        print(f"usage: {_PROGRAM} configs [NAME]\n\nList the configurations of the package, or print one.")
    elif len(arguments) == 2:
        try:
            known = shipped_configs() | shipped_rides()
            print(Path(resolve_config(arguments[1], known)).read_text(encoding="utf-8"), end="")
        except (OSError, ValueError) as error:
            _fail(str(error))
    else:
        shipped = shipped_configs() | shipped_rides()
        width = max(map(len, shipped), default=0)
        for name, path in shipped.items():
            lines = path.read_text(encoding="utf-8").splitlines()
            comment = next((line for line in lines if line.startswith("#")), "")
            print(f"{name:<{width}}  {comment.lstrip('# ')}".rstrip())


COMMANDS: dict[str, Command] = {
    "fit": Command("train, tuning hyperparameters on the way", _run_lightning),
    "validate": Command("evaluate on the validation data", _run_lightning),
    "test": Command("evaluate on the test data", _run_lightning),
    "predict": Command("run the model on the prediction data", _run_lightning),
    "ride": Command("branch a game's training and write down its different solutions", _run_ride),
    "configs": Command("list the configurations that come with the package, or print one", _show_configs),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: {_PROGRAM} [--help] [--version] COMMAND [OPTIONS]\n\n"
        f"{(lightning_nested.__doc__ or '').splitlines()[0]}\n\n"
        f"commands:\n{commands}\n\n"
        f"configurations for --config: {', '.join(shipped_configs())}\n"
        f"configurations for ride --config: {', '.join(shipped_rides())}\n\n"
        f"examples:\n  {_PROGRAM} fit --config digits --trainer.max_epochs 5\n  {_PROGRAM} fit --help"
    )


def _fail(message: str) -> NoReturn:
    print(f"{_PROGRAM}: error: {message}\ntip: {_PROGRAM} --help", file=sys.stderr)
    raise SystemExit(2)
