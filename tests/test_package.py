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
CORE = (
    "dynamics",
    "extras",
    "figures",
    "files",
    "games",
    "hypergradient",
    "hypernetworks",
    "hyperparameters",
    "linalg",
    "networks",
    "optim",
)
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


def in_stub() -> list[tuple[str, str]]:
    """(package, name) of each name in the root's stub, in its order; package "" for the packages themselves."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    return [
        (node.module or "", alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name  # re-exported, to type checkers
    ]


@pytest.mark.parametrize(("package", "name"), in_stub())
def test_public_names_resolve(package: str, name: str) -> None:
    value = getattr(lightning_nested, name)
    assert name in dir(lightning_nested)
    if package:
        home = getattr(lightning_nested, package)
        assert value is getattr(home, name)
        assert name in home.__all__
    else:
        assert value.__name__ == f"lightning_nested.{name}"


def test_the_root_exports_a_name_once() -> None:
    names = [name for _, name in in_stub()]
    assert len(names) > 100
    assert sorted(lightning_nested.__all__) == sorted([*names, "__version__"])
    assert len(set(names)) == len(names)


def test_every_package_is_an_attribute_of_the_root() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {name for package, name in in_stub() if not package} == packages


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="attribute Neuman"):
        _ = lightning_nested.Neuman


def test_type_checkers_see_the_names_that_exist(tmp_path: Path) -> None:
    use = tmp_path / "use.py"
    use.write_text(
        "import lightning_nested as ln\n"
        "ln.callbacks.HypergradientCallback\n"
        "ln.Neumann(num_terms=3)\n"
        "ln.Neuman\n"
        "ln.Neumann(num_term=3)\n"
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--no-error-summary",
        "--cache-dir",
        str(ROOT / ".mypy_cache"),
        use,
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [int(line.split(":")[1]) for line in run.stdout.splitlines() if ": error:" in line]
    assert lines == [4, 5], run.stdout + run.stderr


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
        PACKAGE / "__init__.pyi",
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
