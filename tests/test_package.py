"""The package as it is imported, installed and laid out."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lightning_nested

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_nested"
CORE = ("dynamics", "games", "hypergradient", "hypernetworks", "hyperparameters", "networks", "optim")
LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")


def imported_by(statement: str, *, watched: tuple[str, ...]) -> set[str]:
    """Those of the watched top-level modules that a fresh interpreter has loaded after the statement."""
    code = f"import sys\n{statement}\nprint(*[name for name in {watched!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_the_probe_sees_an_import() -> None:
    assert imported_by("import json", watched=("json", "torch")) == {"json"}


def test_importing_the_root_loads_nothing_heavy() -> None:
    watched = ("torch", "numpy", "scipy", "sklearn", "matplotlib", "torchmetrics", "jsonargparse", *LIGHTNING)
    assert imported_by("import lightning_nested; lightning_nested.__version__", watched=watched) == set()


def test_importing_the_core_loads_no_lightning() -> None:
    statement = "; ".join(f"import lightning_nested.{name}" for name in CORE)
    assert imported_by(statement, watched=("torch", *LIGHTNING)) <= {"torch"}


def test_a_core_name_from_the_root_loads_no_lightning() -> None:
    statement = "from lightning_nested import Neumann"
    assert imported_by(statement, watched=("torch", *LIGHTNING)) == {"torch"}


@pytest.mark.parametrize("name", lightning_nested.__all__)
def test_public_names_resolve(name: str) -> None:
    value = getattr(lightning_nested, name)
    assert name in dir(lightning_nested)
    package = lightning_nested._PACKAGE_OF.get(name)
    if package is not None:
        home = getattr(lightning_nested, package)
        assert value is getattr(home, name)
        assert name in home.__all__


def test_the_root_exports_a_name_once() -> None:
    assert len(set(lightning_nested.__all__)) == 1 + sum(map(len, lightning_nested._EXPORTS.values()))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Neuman'"):
        _ = lightning_nested.Neuman


def test_type_checkers_see_the_names_that_exist() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        (node.module, alias.name, alias.asname)
        for branch in tree.body
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = lightning_nested._PACKAGE_OF.items()
    assert seen == {(f"lightning_nested.{package}", name, name) for name, package in names}


@pytest.mark.parametrize("name", ["callbacks", "configs", "datamodules"])
def test_root_links_point_into_the_package(name: str) -> None:
    assert (ROOT / name).is_symlink()
    assert os.readlink(ROOT / name) == f"lightning_nested/{name}"  # relative: it holds in every clone
    assert (ROOT / name).is_dir()


def test_versions_agree() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version = re.search(r"^version: (.+)$", citation, re.MULTILINE)
    assert version is not None
    assert version[1] == lightning_nested.__version__


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str], str]:
    """File names in a wheel and a source archive made of this tree, and the wheel's entry points."""
    source = tmp_path_factory.mktemp("source")
    # A copy: setuptools leaves `build` and `*.egg-info` beside what it builds.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "lightning_nested", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("callbacks", "configs", "datamodules"):
        shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    code = "from setuptools import build_meta as b; b.build_sdist('out'); b.build_wheel('out')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = (source / "out").glob("*.whl")
    (sdist,) = (source / "out").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
        (entry_points,) = (name for name in in_wheel if name.endswith("entry_points.txt"))
        scripts = archive.read(entry_points).decode()
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    return in_wheel, in_sdist, scripts


def shipped() -> set[str]:
    """What an installation needs of the package folder, as paths from the root."""
    wanted = [
        *PACKAGE.rglob("*.py"),
        *PACKAGE.rglob("*.c"),
        *PACKAGE.glob("configs/**/*.yaml"),
        PACKAGE / "py.typed",
    ]
    return {path.relative_to(ROOT).as_posix() for path in wanted}


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[set[str], set[str], str]) -> None:
    in_wheel, _, scripts = built
    assert {name for name in in_wheel if ".dist-info/" not in name} == shipped()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in in_wheel)
    assert "lightning-nested = lightning_nested.cli:main" in scripts


def test_the_source_archive_holds_the_package(built: tuple[set[str], set[str], str]) -> None:
    _, in_sdist, _ = built
    assert in_sdist >= shipped() | {"pyproject.toml", "README.md", "LICENSE"}
