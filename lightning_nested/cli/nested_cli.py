"""LightningCLI with classes by short name, configurations by name, and errors with close matches."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from typing_extensions import override

from lightning_nested.cli.find_configs import close_matches, resolve_configs
from lightning_nested.datamodules import InMemoryDataModule
from lightning_nested.trainer.lightning import config_value, subcommand_parser

# A class can be given by its short name once it has been imported.
_PACKAGES = (
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


def import_classes() -> None:
    """Import the classes of this package, which makes their short names known to parsers."""
    for package in _PACKAGES:
        import_module(f"lightning_nested.{package}")


class NestedArgumentParser(LightningArgumentParser):
    """Lightning's parser with short errors that end in close matches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A saved command must not change its meaning when an option with the same beginning is added.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    @override
    def print_usage(self, file: Any = None) -> None:
        # Called before an error is printed: the full usage of over a hundred lines would bury it.
        print(f"usage: {self.prog.replace(' [options]', '')} [options]", file=file or sys.stdout)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        super().error("\n".join([message, *dict.fromkeys(_hints(message, parser))]), ex)


class NestedCLI(LightningCLI):
    """Command line for ``fit``, ``validate``, ``test`` and ``predict`` of any LightningModule on any data.

    Classes of this package, of Lightning and of ``torch.optim`` have short names (``--model ImageClassifier``),
    others need their import path. ``--config`` takes a file or the name of a configuration of the package. Data
    may be left out for modules that bring their own.

    There are no options ``--optimizer`` and ``--lr_scheduler``: a module can have several, and takes each as an
    argument of its own (``--model.optimizer Adam``).

    Args:
        args: Arguments of LightningCLI; None: those of the process.
        **kwargs: Further arguments of LightningCLI.
    """

    def __init__(self, *, args: ArgsType = None, **kwargs: Any) -> None:
        import_classes()
        defaults: dict[str, Any] = {
            "model_class": LightningModule,
            "subclass_mode_model": True,
            "subclass_mode_data": True,
            "auto_configure_optimizers": False,
            "parser_class": NestedArgumentParser,
            "parser_kwargs": {"prog": "lightning-nested"},
            # Without a logger every run writes to one folder, and Lightning would refuse the second.
            "save_config_kwargs": {"overwrite": True},
        }
        super().__init__(args=args, **{**defaults, **kwargs})

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--num_threads",
            type=PositiveInt | None,
            default=None,
            help="Threads of one torch operation. Set 1 for small networks: on a busy machine two threads "
            "that waited for each other made a run ten times slower. (default: torch's own choice)",
        )

    @override
    def before_instantiate_classes(self) -> None:
        threads = config_value(self, "num_threads")
        if threads is not None:
            torch.set_num_threads(threads)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if isinstance(args, dict | Namespace):
            self.config = parser.parse_object(args)
            return
        try:
            arguments = resolve_configs(sys.argv[1:] if args is None else args)
        except ValueError as error:
            parser.error(str(error))
        # Not by super(), which warns if both `args` and `sys.argv` are there, as they are here on purpose.
        self.config = parser.parse_args(arguments)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            ours = _raised_here(error)
            # Otherwise it is a bug, or from a class of the user's, and the traceback is needed.
            if ours is None:
                raise
            subcommand_parser(self).error(str(ours), ours)

    @override
    def after_instantiate_classes(self) -> None:
        if isinstance(self.datamodule, InMemoryDataModule):
            # Data in memory needs no worker processes: they would only cost time.
            warnings.filterwarnings("ignore", message=".*does not have many workers")


def _raised_here(error: BaseException | None) -> ValueError | None:
    """Return the innermost argument error in the chain that was raised by a class of this package."""
    if error is None:
        return None
    inner = _raised_here(error.__cause__ or error.__context__)
    if inner is not None or not isinstance(error, ValueError):
        return inner
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    return error if module.startswith("lightning_nested.") else None


def _unknown_words(message: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield the unknown options, classes and arguments that an error of jsonargparse names, with the known ones."""
    options = list(_option_strings(parser))
    for unrecognized in re.findall(r"unrecognized arguments: (.*)", message):
        for option in re.findall(r"(?:^|\s)(--[^\s=]+)", unrecognized):
            yield option, options
    for key in re.findall(r"does not accept option '([^']+)'", message):
        yield key, [option.removeprefix("--") for option in options]
    for name in re.findall(r"Expected a dot import path string: (\S+)", message):
        yield name, _class_names()
    for module, name in re.findall(r"module '([^']+)' has no attribute '([^']+)'", message):
        yield name, dir(import_module(module))
    for path, option in re.findall(r"class_path '([^']+)':\s+Option '([^']+)' is not accepted", message):
        yield option, _parameter_names(path)
    # For a class behind a callable, as an optimizer, the message has the other order.
    reverse = r"Option '([^']+)' is not accepted\. Got value: Namespace\(class_path='([^']+)'"
    for option, path in re.findall(reverse, message):
        yield option, _parameter_names(path)


def _hints(message: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    for word, known in _unknown_words(message, parser):
        question = close_matches(word, known)
        if question:
            yield f"{word}{question.replace('. Did', ': did')}"
    if "arguments are required" in message and "model" in message:
        yield "Give a configuration (--config NAME, see `lightning-nested configs`) or --model CLASS."


def _option_strings(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        # Subcommands.
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                yield from _option_strings(subparser)


def _class_names() -> set[str]:
    ours = {name for package in _PACKAGES for name in import_module(f"lightning_nested.{package}").__all__}
    return ours | {cls.__name__ for base in _BASES for cls in _subclasses(base)}


def _subclasses(base: type) -> Iterator[type]:
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        if not cls.__name__.startswith("_"):
            yield cls
            yield from _subclasses(cls)


def _parameter_names(class_path: str) -> set[str]:
    module, _, name = class_path.rpartition(".")
    constructors = (vars(owner).get("__init__") for owner in getattr(import_module(module), name).__mro__)
    names = {p for init in constructors if init for p in inspect.signature(init).parameters}
    return names - {"self", "args", "kwargs"}
