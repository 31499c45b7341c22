"""LightningCLI with our classes known by short name, our configurations by name, and errors that help."""

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

from lightning_nested.cli.configs import close_matches, resolve_configs
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
    """Make the classes of this package known to parsers."""
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
        # Called before an error is printed: the full usage, of over a hundred lines, would bury it.
        print(f"usage: {self.prog.replace(' [options]', '')} [options]", file=file or sys.stdout)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        hints = dict.fromkeys(_hints(message, parser))  # without repetitions, in order
        super().error("\n".join([message, *hints]), ex)


class NestedCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` of any LightningModule on any LightningDataModule.

    Classes of this package, of Lightning and of ``torch.optim`` go by their short names
    (``--model ImageClassifier``), others by their import path. ``--config`` takes a file or the name of a
    configuration of the package. Data may be left out for modules that bring their own.

    There are no options ``--optimizer`` and ``--lr_scheduler``: a module here can have several, and takes
    each as an argument of its own (``--model.optimizer Adam``).

    Args:
        args: as LightningCLI's; ``None`` for the arguments of the process.
        **kwargs: further arguments of LightningCLI.
    """

    def __init__(self, *, args: ArgsType = None, **kwargs: Any) -> None:
        import_classes()
        defaults: dict[str, Any] = {
            "model_class": LightningModule,
            "subclass_mode_model": True,
            "subclass_mode_data": True,  # with no datamodule_class: any, and not required
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
            help="Threads of one torch operation. Small networks want 1: on a busy machine two threads "
            "that wait for each other made a run ten times slower. (default: torch's own choice)",
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
            if ours is None:  # a bug, or a class of the user's: the traceback is wanted
                raise
            subcommand_parser(self).error(str(ours), ours)

    @override
    def after_instantiate_classes(self) -> None:
        if isinstance(self.datamodule, InMemoryDataModule):
            # Good advice for data that is decoded; here a worker process only adds its own cost.
            warnings.filterwarnings("ignore", message=".*does not have many workers")


def _raised_here(error: BaseException | None) -> ValueError | None:
    """The innermost argument error in the chain that was raised by a class of this package."""
    if error is None:
        return None
    inner = _raised_here(error.__cause__ or error.__context__)
    if inner is not None or not isinstance(error, ValueError):
        return inner
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return (
        error if frames and frames[-1].f_globals.get("__name__", "").startswith("lightning_nested.") else None
    )


def _hints(message: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Close matches for the unknown options, classes and arguments that an error of jsonargparse names."""
    found = re.search(r"unrecognized arguments: (.*)", message)
    options = [word.partition("=")[0] for word in found[1].split() if word.startswith("--")] if found else []
    for option in options:
        yield from _hint(option, _option_strings(parser))
    for key in re.findall(r"does not accept option '([^']+)'", message):
        yield from _hint(key, (option.removeprefix("--") for option in _option_strings(parser)))
    for name in re.findall(r"Expected a dot import path string: (\S+)", message):
        yield from _hint(name, _class_names())
    for module, name in re.findall(r"module '([^']+)' has no attribute '([^']+)'", message):
        yield from _hint(name, dir(import_module(module)))
    refused = [
        *re.findall(r"class_path '([^']+)':\s+Option '([^']+)' is not accepted", message),
        # A class that a callable stands for, as an optimizer, comes in the other order.
        *(
            (class_path, option)
            for option, class_path in re.findall(
                r"Option '([^']+)' is not accepted\. Got value: Namespace\(class_path='([^']+)'", message
            )
        ),
    ]
    for class_path, option in refused:
        yield from _hint(option, _parameter_names(class_path))
    if "arguments are required" in message and "model" in message:
        yield "Give a configuration (--config NAME, see `lightning-nested configs`) or --model CLASS."


def _hint(word: str, known: Iterable[str]) -> Iterator[str]:
    question = close_matches(word, known)
    if question:
        yield f"{word}{question.replace('. Did', ': did')}"


def _option_strings(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action.choices, dict):  # subcommands
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
    cls = getattr(import_module(module), name)
    return {
        parameter
        for owner in inspect.getmro(cls)
        if "__init__" in vars(owner)
        for parameter in inspect.signature(vars(owner)["__init__"]).parameters
    } - {"self", "args", "kwargs"}
