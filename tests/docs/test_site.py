"""The documentation is complete and its links lead somewhere, without building it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import lightning_nested
from lightning_nested.cli.find_configs import shipped_configs, shipped_rides
from tests.command import ROOT
from tests.docs.pages import DOCS, blocks, markdown_pages, notebooks

sys.path.insert(0, str(DOCS))
formulas: ModuleType = import_module("formulas")
links: ModuleType = import_module("links")
quotes: ModuleType = import_module("quotes")
sys.path.remove(str(DOCS))

# Their public classes are exported by the packages that use them.
WITHOUT_NAMES = {"figures", "linalg", "trainer"}


@cache
def described() -> frozenset[str]:
    """Full names of all that the reference describes."""
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    return frozenset(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))


def packages() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "lightning_nested").glob("*/__init__.py"))


@pytest.mark.parametrize("package", packages())
def test_the_reference_describes_every_public_name(package: str) -> None:
    names = getattr(import_module(f"lightning_nested.{package}"), "__all__", [])
    assert bool(names) == (package not in WITHOUT_NAMES)
    missing = {f"lightning_nested.{package}.{name}" for name in names} - described()
    assert not missing, "add them to docs/reference"


def test_the_reference_describes_every_name_of_the_root() -> None:
    tree = ast.parse((ROOT / "lightning_nested/__init__.pyi").read_text(encoding="utf-8"))
    found = {
        f"lightning_nested.{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert len(found) > 100
    assert not found - described(), "add them to docs/reference"


def test_what_the_reference_describes_exists() -> None:
    for name in described():
        package, _, last = name.rpartition(".")
        assert hasattr(import_module(package), last), name
    assert hasattr(lightning_nested, "__version__")


def test_the_gallery_has_a_page_for_every_configuration() -> None:
    pages = {path.stem for path in (DOCS / "gallery").glob("*.md")} - {"index"}
    commands = {name: f"fit --config {name}" for name in shipped_configs()}
    commands |= {f"ride_{name}": f"ride --config {name}" for name in shipped_rides()}
    assert pages == set(commands)
    index = (DOCS / "gallery/index.md").read_text(encoding="utf-8")
    for page, command in commands.items():
        text = (DOCS / f"gallery/{page}.md").read_text(encoding="utf-8")
        assert "| takes |" in text, page
        assert "![" in text or "No picture, since nobody has run it" in text, page
        assert command in text or f"--config {page}\n" in text, page
        assert f"]({page}.md)" in index, page


def navigation() -> set[str]:
    def leaves(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from leaves(part)

    return set(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in markdown_pages()}
    pages |= {path.relative_to(DOCS).with_suffix(".md").as_posix() for path in notebooks()}
    assert navigation() == pages


@cache
def anchors(path: Path) -> frozenset[str]:
    """Anchors of the headings of a page, as Python-Markdown forms them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        text = re.sub(r"[`*_$]|\{\{.*?\}\}", "", heading)
        text = re.sub(r"[^\w\s-]", "", text.encode("ascii", "ignore").decode()).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", text))
    return frozenset(found)


@pytest.mark.parametrize("path", [*markdown_pages(), ROOT / "README.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        if found.parent.name == "notebooks" and found.suffix == ".md":
            found = found.with_suffix(".ipynb")
        assert found.exists(), f"{target} in {path.relative_to(ROOT)}"
        if anchor:
            assert anchor in anchors(found), f"{target} in {path.relative_to(ROOT)}"


def test_indices_in_docstrings_are_set_low_outside_of_code() -> None:
    text = "dL_V/dλ = ∂²L_T, Σ_{k=0}^{K} Aᵏ b; w_i² and 2^d, `L_V`, ``w_{t}``, train_x, λ_max, g_t.\n>>> x_i = 2\nx ^ y"
    assert formulas.with_indices(text) == (
        "dL<sub>V</sub>/dλ = ∂²L<sub>T</sub>, Σ<sub>k=0</sub><sup>K</sup> Aᵏ b; w<sub>i</sub>² and 2<sup>d</sup>, "
        "`L_V`, ``w_{t}``, train_x, λ<sub>max</sub>, g<sub>t</sub>.\n>>> x_i = 2\nx ^ y"
    )


def test_broken_links_of_built_pages_are_found(tmp_path: Path) -> None:
    (tmp_path / "guides").mkdir()
    (tmp_path / "guides/a.html").write_text('<h1 id="top">A</h1><a href="../index.html">back</a>')
    good = '<a href="guides/a.html#top">a</a><a href="https://example.org">b</a><a href="#c">c</a><p id="c">'
    index = tmp_path / "index.html"
    index.write_text(good)
    assert links.broken_links(tmp_path) == []
    index.write_text(
        good
        + '<a href="guides/b.html">b</a><a href="guides/a.html#no">a</a><img src="p.png"><a href="guides">d</a>'
        + '<script src="https://example.org/s.js"></script>'
    )
    assert links.broken_links(tmp_path) == [
        "guides/b.html in index.html leads to no file.",
        "guides/a.html#no in index.html has an anchor that is not in its page.",
        "p.png in index.html leads to no file.",
        "guides in index.html leads to no file.",
        "https://example.org/s.js in index.html is fetched from elsewhere.",
    ]


def test_quoted_figures_and_tables_exist_and_are_used() -> None:
    used = set()
    for path in markdown_pages():
        text = path.read_text(encoding="utf-8")
        quotes.filled(text)  # raises where a figure or a table is missing
        used |= set(quotes.FIGURE.findall(text))
    assert used == set(quotes.figures()), "take unused figures out of docs/figures.yml"


def test_a_missing_quote_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"docs/figures.yml. Got none"):
        quotes.filled("costs {{ no_such_figure }}")
    with pytest.raises(ValueError, match=r"must be in docs/results.md once. Got 'No such', 0 times"):
        quotes.filled('{{ table "No such" }}')
    with pytest.raises(ValueError, match=r"must have 9 tables"):
        quotes.filled('{{ table "The main job" 9 }}')
    with pytest.raises(ValueError, match=r"must have numbers. Got none in the rows of 'none'"):
        quotes.filled('{{ bars "A step of each optimizer" 1 columns 1 2 rows "none" }}')


def test_bars_are_as_long_as_the_numbers_of_a_table() -> None:
    drawn = quotes.filled('{{ bars "Which solver" 1 columns 1 2 rows "Neumann" }}')
    values = [float(v) for v in re.findall(r">([\d.]+)</i>", drawn)]
    shares = [float(v) for v in re.findall(r"--share: ([\d.]+)", drawn)]
    assert len(values) == 3
    assert shares == pytest.approx([v / max(values) for v in values], abs=1e-4)
    assert "<span>Neumann, step 1/λ_max</span>" in drawn
    assert 'aria-label="products to 1 %"' in drawn


def test_each_page_of_results_has_a_figure_a_table_and_where_it_loses() -> None:
    for path in sorted((DOCS / "results").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if path.name != "index.md":
            assert "![" in text or "{{ bars" in text, path.name
            assert "{{ table" in text or "| --- |" in text, path.name
            assert "**Question.**" in text, path.name
            assert "**Where it loses.**" in text, path.name
            assert "```bash" in text, path.name


def test_shell_blocks_name_what_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    configs = {*shipped_configs(), *shipped_rides()}
    lines = [
        (path, line)
        for path in (*markdown_pages(), ROOT / "README.md")
        for block in blocks(path)
        if block.kind == "bash"
        for line in block.code.splitlines()
    ]
    assert len(lines) > 30
    for path, line in lines:
        words = line.partition("#")[0].split()
        files = {b.title for b in blocks(path)}
        for option, value in pairwise(words):
            assert option != "--config" or value in configs | files, f"{line} in {path.name}"
            assert option != "make" or value in targets, f"{line} in {path.name}"
        for word in words:
            if word.startswith(("scripts/", "benchmarks/", "tests/")):
                assert (ROOT / word).exists(), f"{line} in {path.name}"
