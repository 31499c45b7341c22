"""The package as it is imported, installed and laid out."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import NamedTuple

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


# Other modules are skipped, and what they define is Any: the whole package with torch takes mypy twenty seconds.
READ_BY_MYPY = """
[mypy]
follow_imports = skip
[mypy-lightning_nested,lightning_nested.callbacks,lightning_nested.hypergradient,lightning_nested.linalg.solvers.*]
follow_imports = normal
"""


def test_type_checkers_see_the_names_that_exist(tmp_path: Path) -> None:
    use, settings = tmp_path / "use.py", tmp_path / "mypy.ini"
    use.write_text(
        "import lightning_nested as ln\n"
        "ln.callbacks.HypergradientCallback\n"
        "ln.Neumann(num_terms=3)\n"
        "ln.Neuman\n"
        "ln.Neumann(num_term=3)\n"
        "ln.callbacks.HypergradientCallbac\n"
    )
    settings.write_text(READ_BY_MYPY)
    command = [
        *(sys.executable, "-m", "mypy", "--no-error-summary"),
        *("--config-file", str(settings), "--cache-dir", str(tmp_path / "cache"), str(use)),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # With an old torch mypy finds errors in the package too: torch's functions had no types.
    found = [line for line in run.stdout.splitlines() if line.startswith(str(use)) and ": error:" in line]
    lines = [int(line.split(":")[1]) for line in found]
    assert lines == [4, 5, 6], run.stdout + run.stderr


@pytest.mark.skipif(not (ROOT / ".gitignore").exists(), reason="a source archive has no links")
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


class Built(NamedTuple):
    """What a source archive and the wheel made of it hold."""

    in_wheel: set[str]
    in_sdist: set[str]
    scripts: str
    metadata: Message
    wheel: bytes


def wheel_of(source: Path, *, out: str, epoch: str = "1700000000", before: str = "") -> Path:
    """Build the wheel in a process, after some code of ``b``, the build backend."""
    code = f"from setuptools import build_meta as b; {before}b.build_wheel({out!r})"
    environment = {**os.environ, "SOURCE_DATE_EPOCH": epoch}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = (source / out).glob("*.whl")
    return wheel


def build(source: Path, *, out: str) -> Built:
    wheel = wheel_of(source, out=out, before=f"b.build_sdist({out!r}); ")
    (sdist,) = (source / out).glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
        (entry_points,) = (name for name in in_wheel if name.endswith("entry_points.txt"))
        (metadata,) = (name for name in in_wheel if name.endswith("METADATA"))
        scripts = archive.read(entry_points).decode()
        message = message_from_bytes(archive.read(metadata))
    with tarfile.open(sdist) as opened:
        in_sdist = {name.partition("/")[2] for name in opened.getnames()}
    return Built(in_wheel, in_sdist, scripts, message, wheel.read_bytes())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is kept in the repository: setuptools leaves `build` and `*.egg-info` beside what it builds."""
    copy = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        # Not environments, caches, runs and results of other builds.
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    for name in ("benchmarks", "constraints", "docs", "lightning_nested", "scripts", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("callbacks", "configs", "datamodules"):
        (copy / name).symlink_to(f"lightning_nested/{name}")
    return copy


@pytest.fixture(scope="module")
def built(source: Path) -> Built:
    return build(source, out="out")


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


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    assert {name for name in built.in_wheel if ".dist-info/" not in name} == shipped()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in built.in_wheel)
    assert "lightning-nested = lightning_nested.cli:main" in built.scripts


def test_the_source_archive_holds_the_package_and_what_its_tests_need(source: Path, built: Built) -> None:
    kept = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    generated = ("out/", "build/", "lightning_nested.egg-info/")
    links = ("callbacks/", "configs/", "datamodules/")
    assert built.in_sdist >= shipped() | {name for name in kept if not name.startswith((*generated, *links))}
    assert not [name for name in built.in_sdist if name.startswith(links)]


def test_two_builds_are_one_wheel(source: Path, built: Built) -> None:
    assert wheel_of(source, out="again").read_bytes() == built.wheel
    assert wheel_of(source, out="later", epoch="1800000000").read_bytes() != built.wheel


def test_the_description_has_no_link_that_leads_nowhere(built: Built) -> None:
    assert built.metadata["Description-Content-Type"] == "text/markdown"
    description = str(built.metadata.get_payload())
    assert description.startswith("# lightning-nested\n")
    assert not re.findall(r"\]\((?!\w+:|#)[^)\s]+\)", description)
    described = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["described"]
    text = "![a picture](docs/a.png) [b](docs/b.md#c) [d](https://d.org) [e](#f)"
    here = "https://example.org/x"
    assert described(text, None) == " b [d](https://d.org) [e](#f)"
    assert described(text, here) == (
        f"![a picture]({here}/raw/main/docs/a.png) [b]({here}/blob/main/docs/b.md#c) [d](https://d.org) [e](#f)"
    )
