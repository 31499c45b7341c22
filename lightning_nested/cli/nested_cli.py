"""LightningCLI with classes by short name, configurations by name, and errors with close matches."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_nested.cli.callback_options import callback_options, with_callback_options
from lightning_nested.cli.completion import completion_script, shells
from lightning_nested.cli.find_configs import resolve_configs
from lightning_nested.cli.messages import PACKAGES, explained
from lightning_nested.datamodules import InMemoryDataModule, TabularDataModule, TextDataModule
from lightning_nested.extras import require_package
from lightning_nested.trainer.lightning import config_value, subcommand_parser

_LOADERS = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


def import_classes() -> None:
    """Import the classes of this package, which makes their short names known to parsers."""
    for package in PACKAGES:
        import_module(f"lightning_nested.{package}")


class NestedArgumentParser(LightningArgumentParser):
    """Lightning's parser with short errors that end in close matches.

    Attributes:
        configs: Configuration files of the command, for errors about what is missing.
    """

    configs: Sequence[str] = ()

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
        # A parser inside another one only reports to it: the outermost one shortens the whole.
        if self.exit_on_error:
            message = explained(message, getattr(ex, "subcommand_parser", None) or self, self.configs)
        super().error(message, ex)


class NestedCLI(LightningCLI):
    """Command line for ``fit``, ``validate``, ``test`` and ``predict`` of any LightningModule on any data.

    Classes of this package, of Lightning and of ``torch.optim`` have short names (``--model ImageClassifier``),
    others need their import path. ``--config`` takes a file or the name of a configuration of the package. Data
    may be left out for modules that bring their own.

    ``--trainer.callbacks.HypergradientCallback.every_n_steps 2`` changes an option of that callback of a configuration,
    and ``--trainer.callbacks.HypergradientCallback.solver.num_terms 5`` one inside it; ``--trainer.callbacks.OPTION``
    is about the last callback. ``--print_shtab bash`` prints a script by which the shell completes options.

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
        pairs = list(pairwise(["", *arguments, ""]))
        for argument, value in pairs:
            option, joined, own = argument.partition("=")
            if option == "--print_shtab":
                _print_completion(parser, own if joined else value)
        # for errors about what is missing
        parser.configs = [value for option, value in pairs if option in ("-c", "--config")]  # type: ignore[attr-defined]
        arguments, changes = callback_options(arguments)
        shows = bool(changes) and "--print_config" in arguments
        # Not by super(), which warns if both `args` and `sys.argv` are there, as they are here on purpose.
        self.config = parser.parse_args([a for a in arguments if not shows or a != "--print_config"])
        if changes:
            self.config = with_callback_options(parser, self.config, changes)
        if shows:
            self.subcommand = self.config.subcommand
            print(subcommand_parser(self).dump(self.config[self.subcommand], skip_none=False), end="")
            parser.exit()

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
        if self.subcommand is not None and self.datamodule is None:
            self._require_data()

    def _require_data(self) -> None:
        loader = f"{_LOADERS[str(self.subcommand)]}_dataloader"
        if not is_overridden(loader, self.model):
            subcommand_parser(self).error(
                f"--model {type(self.model).__name__} has no {loader} of its own, so --data CLASS is needed "
                "(--data DigitsDataModule), or a configuration that names both (--config digits)."
            )

    @override
    def after_instantiate_classes(self) -> None:
        if isinstance(self.datamodule, InMemoryDataModule | TabularDataModule | TextDataModule):
            # Data in memory needs no worker processes: they would only cost time.
            warnings.filterwarnings("ignore", message=".*does not have many workers")


def _print_completion(parser: LightningArgumentParser, shell: str) -> NoReturn:
    """Print a script by which a shell completes the command line, and exit."""
    from lightning_nested.cli.ride import ride_parser

    require_package("shtab")
    if shell not in shells():
        parser.error(f"--print_shtab must be followed by a shell: {', '.join(shells())}. Got {shell!r}.")
    commands = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    if not commands:
        parser.error("--print_shtab needs the program's subcommands. Got NestedCLI(run=False).")
    print(completion_script({**commands[0], "ride": ride_parser()}, shell))
    parser.exit()


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
