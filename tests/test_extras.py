"""Packages that only some parts need: without them the rest works, and the error names the cure."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lightning_nested.datamodules import DigitsDataModule, ExperienceDataModule, FashionMNISTDataModule
from lightning_nested.dynamics import Ray
from lightning_nested.extras import EXTRAS, MissingExtraError, require_package
from lightning_nested.figures.style import styled_figure
from lightning_nested.networks import build_network
from tests.command import ROOT, error_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PACKAGE = ROOT / "lightning_nested"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Not imported by name: Lightning's TensorBoardLogger writes with it.
THROUGH_LIGHTNING = {"tensorboard"}
# Imported from the standard library or by name.
OTHERS = {"lightning_nested", "shtab"}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(r).name) for r in requirements}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Top-level packages that a file imports, each with whether that happens as soon as the file is imported."""
    waiting: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), True)]
    while waiting:
        node, at_once = waiting.pop()
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names:
                yield top, at_once
        later = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        # An import is a statement: no expression has one.
        waiting += [
            (child, at_once and not later)
            for child in ast.iter_child_nodes(node)
            if not isinstance(child, ast.expr)
        ]


@cache
def imported() -> dict[str, set[tuple[str, bool]]]:
    """Files, relative to the package, by the outside packages that they import."""
    found: dict[str, set[tuple[str, bool]]] = {}
    for path in PACKAGE.rglob("*.py"):
        for top, at_once in imports(path):
            if top not in OTHERS:
                found.setdefault(top, set()).add((path.relative_to(PACKAGE).as_posix(), at_once))
    return found


def distribution(package: str) -> str:
    # Before Python 3.11 it knows those packages only that have a top_level.txt.
    return canonicalize_name(installed().get(package, [package])[0])


@cache
def installed() -> Mapping[str, list[str]]:
    return packages_distributions()


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    base = names(PROJECT["dependencies"])
    used = {distribution(package) for package in imported() if package not in EXTRAS}
    assert used == base - THROUGH_LIGHTNING
    extras = PROJECT["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert distribution(package) in names(extras[extra]) - base, package
    offered = {extra: names(found) for extra, found in extras.items() if extra not in ("all", "dev", "docs")}
    assert set().union(*offered.values()) == {distribution(package) for package in EXTRAS}
    everything = Requirement(extras["all"][0]).extras
    assert everything == set(offered)


def test_only_the_command_line_imports_an_extra_at_once() -> None:
    for package in EXTRAS:
        for path, at_once in imported().get(package, ()):
            assert not at_once or path.startswith("cli/"), (package, path)


def test_lower_bounds_are_the_constraints_that_were_run() -> None:
    lines = (ROOT / "constraints/lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = {
        canonicalize_name(Requirement(line).name): next(iter(Requirement(line).specifier)).version
        for line in lines
        if line and not line.startswith("#")
    }
    extras = [PROJECT["optional-dependencies"][e] for e in ("cli", "digits", "figures", "images")]
    for requirement in map(Requirement, sum(extras, list(PROJECT["dependencies"]))):
        for bound in requirement.specifier:
            if bound.operator == ">=":
                run = lowest[canonicalize_name(requirement.name)]
                assert re.sub(r"(\.0)+$", "", run) == re.sub(r"(\.0)+$", "", bound.version), requirement


def ray() -> None:
    next(iter(Ray().map(len, [("", ())])))  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("sklearn", lambda: DigitsDataModule().setup("fit")),
        ("torchvision", lambda: build_network("resnet18", num_classes=2, input_shape=(3, 32, 32))),
        ("torchvision", lambda: FashionMNISTDataModule(root="nowhere").prepare_data()),
        ("matplotlib", lambda: styled_figure(1, 1).__enter__()),
        ("gymnasium", lambda: ExperienceDataModule().train_dataloader()),
        ("ray", ray),
    ],
)
def test_a_missing_extra_is_one_sentence(
    package: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(FashionMNISTDataModule, "_folder", lambda self: None)
    with pytest.raises(MissingExtraError) as error:
        use()
    cure = f"pip install 'lightning-nested[{EXTRAS[package]}]'"
    assert str(error.value) == f"The package {package} is needed here. Got none installed: {cure}"


def test_the_command_line_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    for command in ("fit", "ride"):
        assert "pip install 'lightning-nested[cli]'" in error_of(command, capsys=capsys)


def test_a_broken_package_is_told_from_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray.py").write_text("import lightning_nested.nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(
        MissingExtraError,
        match=r"The package ray must be importable\. Got ModuleNotFoundError: No module named 'light",
    ):
        require_package("ray")


FIT = """
import sys
import torch
from lightning import LightningModule, Trainer
import lightning_nested
from lightning_nested.callbacks import HypergradientCallback, LyapunovCallback, GameSpectrumCallback, GeneratorEMA
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.modules import GameModule, HypernetworkModule, NestedModule, TunedImageClassifier

class Fit(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()
    validation_step = training_step
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 2)), batch_size=4)
tuner = HypergradientCallback(WeightDecay(), every_n_steps=1, warmup_steps=0)
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
Trainer(max_steps=4, accelerator="cpu", callbacks=[tuner, LyapunovCallback(1)], **quiet).fit(Fit(), data, data)
print("outer steps", tuner.outer_steps)
"""


# Hides the packages' metadata, by which torchmetrics decides what to import, and the modules.
HIDDEN = """
import importlib.metadata
from importlib.machinery import PathFinder
distributions, modules = {distributions!r}, {modules!r}
distribution, find = importlib.metadata.Distribution.from_name, PathFinder.find_spec
def from_name(name):
    if name.replace("-", "_") in distributions:
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)
importlib.metadata.Distribution.from_name = from_name
PathFinder.find_spec = lambda name, *rest: None if name in modules else find(name, *rest)
"""


def fits(before: str, folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", before + FIT],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "outer steps 4" in run.stdout


def test_callbacks_run_without_any_extra(tmp_path: Path) -> None:
    # Lightning's progress bar needs tqdm, and installs it.
    modules = sorted(EXTRAS.keys() - {"tqdm"})
    fits(HIDDEN.format(distributions=[*modules, "scikit_learn"], modules=modules), tmp_path)


def test_callbacks_run_beside_a_broken_torchvision(tmp_path: Path) -> None:
    # As without [images]: where the two are installed, torchmetrics imports them, and Lightning imports torchmetrics.
    # Even then it tries, and only an ImportError is no fault to it.
    (tmp_path / "torchvision.py").write_text(
        "raise ImportError('operator torchvision::nms does not exist')\n"
    )
    fits(HIDDEN.format(distributions=["torch_fidelity", "torchvision"], modules=["torch_fidelity"]), tmp_path)
