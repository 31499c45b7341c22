"""``lightning-nested ride``: branch the training of a small game, and write its solutions to files."""

from __future__ import annotations

import csv
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm
from typing_extensions import override

# Short names of classes resolve once they are imported.
import lightning_nested.games
import lightning_nested.optim
from lightning_nested.cli.find_configs import shipped_rides
from lightning_nested.dynamics import GeneralizedRidgeRider, InProcess, Processes, RideTree
from lightning_nested.dynamics.riders.executors import Executor
from lightning_nested.extras import require_package
from lightning_nested.files import replace_figure, replace_text
from lightning_nested.games import Game
from lightning_nested.linalg.vectors import Vector

# Solutions on a branching point's line.
_SHOWN = 4


def _games() -> list[str]:
    found = [getattr(lightning_nested.games, name) for name in lightning_nested.games.__all__]
    return [g.__name__ for g in found if inspect.isclass(g) and issubclass(g, Game) and g is not Game]


class _Parser(ArgumentParser):
    """Parser that prints errors without the usage of fifty lines."""

    @override
    def print_usage(self, file: Any = None) -> None:
        print(f"usage: {self.prog} [options]", file=file or sys.stdout)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Before jsonargparse 4.49 the sentence was another one.
        if re.search(r"required: game$|['\"]game['\"] is required", message):
            choice = f"(class of a game), or --config {' or '.join(shipped_rides())}"
            message = f"the following arguments are required: game {choice}"
        if message.startswith('Parser key "game":'):
            message += f"\nGames of the package: {', '.join(sorted(_games()))}"
        super().error(message, ex)


def ride_parser() -> ArgumentParser:
    """Return the parser of the command's options."""
    parser = _Parser(
        prog="lightning-nested ride",
        description="Find points where the training of a game branches, and the solutions on either side.",
    )
    option = parser.add_argument
    option("--config", action="config", help="A file, or the name of a ride of the package.")
    option("--seed_everything", type=NonNegativeInt, default=0, help="Seed of the first start.")
    option("--starts", type=PositiveInt, default=10, help="Number of start points, one seed each.")
    option(
        "--output", type=Path, default=Path("ride"), help="Folder of results; an interrupted ride continues."
    )
    option("--workers", type=PositiveInt, default=1, help="Processes; short for --executor Processes.")
    text = "Executor of branches: InProcess, Processes or Ray."
    default = {"class_path": "InProcess"}
    parser.add_subclass_arguments(Executor, "executor", required=False, default=default, help=text)
    option("--num_threads", type=PositiveInt, default=1, help="Threads of one torch operation.")
    option("--figure", type=bool, default=True, help="Draw ride.png.")
    parser.add_subclass_arguments(Game, "game", required=True)
    optimizer = option(
        "--optimizer",
        type=Callable[[list[Tensor]], Optimizer],
        default={"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}},
        help="Optimizer of the training; one that update_map knows.",
    )
    # Before torch 2.6 the parameters had no annotation.
    optimizer.sub_add_kwargs["fail_untyped"] = False
    parser.add_class_arguments(GeneralizedRidgeRider, "rider", skip={"executor"}, as_group=True)
    return parser


def run_ride(arguments: Sequence[str]) -> RideTree:
    """Parse the arguments, ride, and write ``solutions.json``, ``branches.csv`` and ``ride.png``."""
    parser = ride_parser()
    _check_files(parser, arguments)
    config = parser.parse_args(list(arguments))
    if config.figure:
        # Now, not after the ride.
        require_package("matplotlib")
    torch.set_num_threads(config.num_threads)
    optimizer = _optimizer(config.optimizer)
    try:
        game, rider = _objects(parser, config)
        seeds = range(config.seed_everything, config.seed_everything + config.starts)
        starts = [tuple(p.detach() for p in game.initial(torch.Generator().manual_seed(s))) for s in seeds]
        with _progress() as progress:
            tree: RideTree = rider.ride(
                game.losses, starts, optimizer, folder=config.output, progress=progress
            )
    except OSError as error:
        _refuse_output(parser, config, error)
    except (ValueError, FloatingPointError, MemoryError, ModuleNotFoundError) as error:
        parser.error(str(error))
    print_tree(tree)
    try:
        write_results(tree, game, starts[0], config.output)
        if config.figure:
            from lightning_nested.figures.ride import ride_figure

            figure = ride_figure(tree, game, starts, optimizer, rider.branching)
            replace_figure(config.output / "ride.png", figure, bbox_inches="tight", pad_inches=0.15)
    except OSError as error:
        _refuse_output(parser, config, error)
    print(f"\nWrote {config.output}: solutions.json, branches.csv{', ride.png' if config.figure else ''}")
    return tree


def _refuse_output(parser: ArgumentParser, config: Namespace, error: OSError) -> NoReturn:
    parser.error(f"--output must be a folder that can be written. Got {config.output}: {error}.", error)


def _check_files(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Name the file that cannot be read, which the parser's own error does not."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name = argument if before == "--config" else argument.partition("--config=")[2]
        if name and Path(name).is_file():
            try:
                yaml.safe_load(Path(name).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                parser.error(f"--config must be a YAML file. Got {name}: {error}")


def _objects(parser: ArgumentParser, config: Namespace) -> tuple[Game, GeneralizedRidgeRider]:
    # The method had another name before jsonargparse 4.49.
    objects = getattr(parser, "instantiate", parser.instantiate_classes)(config)
    executor: Executor = objects.executor
    if config.workers > 1:
        if not isinstance(executor, InProcess):
            raise ValueError(
                f"--workers is short for an executor. Got --workers {config.workers} and {executor}: give one of them."
            )
        executor = Processes(max_workers=config.workers)
    game: Game = objects.game
    return game, replace(objects.rider, executor=executor)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that shows one progress bar for each kind of work."""
    with ExitStack() as bars:
        shown: dict[str, tqdm[Any]] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in shown:
                bars.close()
                shown.clear()
                shown[what] = bars.enter_context(tqdm(total=total, desc=what, unit="branch"))
            shown[what].update(done - shown[what].n)

        yield update


def write_results(tree: RideTree, game: Game, like: Vector, folder: Path) -> None:
    """Write ``solutions.json``, a list with the best first, and ``branches.csv``, a row per node of the tree."""
    solutions = []
    for s in tree.solutions():
        end = tree.branches[s.branches[0]]
        policies = game.policies(end.tensors(like))
        solutions.append(
            {
                "losses": s.losses,
                **({} if policies is None else {"policies": [p.tolist() for p in policies]}),
                "behaviour": s.behaviour,
                "parameters": end.end,
                "branches": s.branches,
            }
        )
    replace_text(folder / "solutions.json", json.dumps(solutions, indent=1) + "\n")
    rows, text = tree.table(), StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    replace_text(folder / "branches.csv", text.getvalue())


def print_tree(tree: RideTree) -> None:
    """Print a line for each branching point and its solutions, then all solutions ranked."""
    print("\nbranching point  top exponent  solutions below it (losses × branches)")
    for root in tree.roots:
        solutions = tree.solutions(tree.below(root.name))
        shown = sorted(solutions, key=lambda s: -len(s.branches))[:_SHOWN]
        found = "   ".join(f"{_losses(s.losses)} ×{len(s.branches)}" for s in shown)
        more = f"   and {len(solutions) - len(shown)} rarer ones" if len(solutions) > len(shown) else ""
        print(
            f"{root.name:>15}  {root.exponents[0]:>12.4f}  {found or 'training leaves finite numbers'}{more}"
        )
    solutions = tree.solutions()
    lost = sum(not b.finite for b in tree.leaves)
    print(f"\n{len(solutions)} solutions in {len(tree.leaves)} branches, the lowest sum of losses first:")
    for i, s in enumerate(solutions):
        roots = {tree.origin(name) for name in s.branches}
        print(
            f"{i:>3}  losses {_losses(s.losses)}  {len(s.branches)} branches of {len(roots)} branching points"
        )
    if lost:
        print(f"     {lost} branches left the finite numbers and are no solutions")


def _losses(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{v:.3f}" for v in values) + ")"


def _optimizer(config: Namespace | dict[str, Any]) -> Callable[[list[Tensor]], Optimizer]:
    """Return the class with its options; unlike a parser's closure it can be sent to another process."""
    options = config if isinstance(config, dict) else config.as_dict()
    module, _, name = options["class_path"].rpartition(".")
    cls = getattr(import_module(module), name)
    known = inspect.signature(cls).parameters
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.get("init_args", {}).items()}
    return partial(cls, **{k: v for k, v in given.items() if k in known})
