"""Pages of the documentation: their files, and the code that they show."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

from tests.command import ROOT

DOCS = ROOT / "docs"
_FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>[\w.+-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)


@cache
def markdown_pages() -> tuple[Path, ...]:
    """All pages that are written as Markdown."""
    return tuple(sorted(DOCS.rglob("*.md")))


@cache
def blocks(path: Path, kind: str) -> tuple[str, ...]:
    """The fenced blocks of a kind in a page, or a notebook's cells, in their order, without indentation."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return tuple("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = []
    for match in _FENCE.finditer(text):
        if match["kind"] == kind:
            width = len(match["indent"])
            found.append("\n".join(line[width:] for line in match["code"].splitlines()))
    return tuple(found)


def program(path: Path) -> ast.Module:
    """All Python blocks of a page as one program, with line numbers that count the blocks' lines."""
    return ast.parse("\n\n".join(blocks(path, "python")), filename=str(path.relative_to(ROOT)))


def is_slow(path: Path) -> bool:
    """Whether a page says that its code takes long: a comment in its first line."""
    return path.read_text(encoding="utf-8").startswith("<!-- slow -->")
