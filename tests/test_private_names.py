"""Names of Lightning that begin with an underscore: one file takes them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch.cli
import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

import lightning_nested

PACKAGE = Path(lightning_nested.__file__).parent
ALLOWED = PACKAGE / "trainer" / "lightning.py"

# Names that our code gives to objects of Lightning: on these no private name is ours.
LIGHTNINGS = {
    "trainer",
    "fit_loop",
    "epoch_loop",
    "val_loop",
    "strategy",
    "connector",
    "call",
    "precision_plugin",
}

# Documented by Lightning for overriding `state_key`.
DOCUMENTED = {"_generate_state_key"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_in(tree: ast.AST) -> set[str]:
    """Private names that code defines: functions, methods, class attributes and attributes of ``self``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) == "self"
        ):
            names.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if is_private(name)}


@functools.cache
def lightning_names() -> set[str]:
    """Private names of Lightning's Trainer, loops, connectors, strategies, modules, optimizers and command line."""
    names: set[str] = set()
    for package in ("core", "loops", "strategies", "trainer", "utilities", "callbacks", "plugins"):
        root = importlib.import_module(f"lightning.pytorch.{package}")
        for info in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
            spec = importlib.util.find_spec(info.name)
            if spec is not None and spec.origin is not None:
                names |= names_in(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    names |= names_in(ast.parse(inspect.getsource(lightning.pytorch.cli)))
    for cls in (lightning.pytorch.Trainer, lightning.pytorch.LightningModule, LightningOptimizer):
        names |= {name for name in dir(cls) if is_private(name)}
    torchs = {name for name in dir(nn.Module()) if is_private(name)}
    return names - DOCUMENTED - torchs - {name for name in dir(torch.Tensor) if is_private(name)}


def violations(source: str, lightnings: set[str], ours: set[str]) -> Iterator[tuple[int, str]]:
    """Line and text of each private name of Lightning that the code takes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0].startswith("lightning"):
            if not (node.module or "").startswith("lightning_nested"):
                yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute):
            holder = ast.unparse(node.value).rsplit(".", 1)[-1]
            if is_private(node.attr) and (
                holder in LIGHTNINGS or (node.attr in lightnings and node.attr not in ours)
            ):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            name = node.args[1]
            if (
                isinstance(name, ast.Constant)
                and is_private(str(name.value))
                and name.value in lightnings - ours
            ):
                yield node.lineno, ast.unparse(node)


def test_only_one_file_takes_private_names_of_lightning() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path != ALLOWED]
    sources = {path: path.read_text(encoding="utf-8") for path in files}
    ours = set().union(*(names_in(ast.parse(source)) for source in sources.values()))
    lightnings = lightning_names()
    found = [
        f"{path.relative_to(PACKAGE)}:{line} {text}"
        for path, source in sources.items()
        for line, text in violations(source, lightnings, ours)
    ]
    assert not found, "take these in trainer/lightning.py, by a plainly named function:\n" + "\n".join(found)


def test_the_one_file_does_take_some() -> None:
    assert list(violations(ALLOWED.read_text(encoding="utf-8"), lightning_names(), set()))


@pytest.mark.parametrize(
    "code",
    [
        "from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader",
        "trainer._results",
        "self.trainer._data_connector",
        "trainer.fit_loop.epoch_loop._batches_that_stepped",
        "module._on_before_batch_transfer(batch)",
        "call._call_lightning_module_hook(trainer, 'training_step')",
        "optimizer._on_before_step = None",
        "getattr(strategy, '_ddp_kwargs', {})",
    ],
)
def test_finds(code: str) -> None:
    assert list(violations(code, lightning_names(), {"_results"}))


@pytest.mark.parametrize(
    "code", ["self._results", "module._buffers", "from lightning_nested.games.rates import _x"]
)
def test_lets_pass(code: str) -> None:
    assert not list(violations(code, lightning_names(), {"_results"}))
