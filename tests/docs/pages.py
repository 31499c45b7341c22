"""Pages of the documentation: their files, and the code that they show."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.command import ROOT

DOCS = ROOT / "docs"
_FENCE = re.compile(r"^( *)```([\w.+-]*)([^\n]*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r'title="([^"]+)"')


class Block(NamedTuple):
    """A fenced block of a page, or a cell of a notebook."""

    kind: str
    title: str  # name of the file that it shows, or ""
    code: str
    line: int  # in the page, from 1


@cache
def markdown_pages() -> tuple[Path, ...]:
    """All pages that are written as Markdown."""
    return tuple(sorted(DOCS.rglob("*.md")))


@cache
def notebooks() -> tuple[Path, ...]:
    return tuple(sorted(DOCS.rglob("*.ipynb")))


@cache
def blocks(path: Path) -> tuple[Block, ...]:
    """The fenced blocks of a page, or a notebook's cells, in their order, without their indentation."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return tuple(Block("python", "", "".join(cell["source"]), 1) for cell in cells)
    found = []
    for match in _FENCE.finditer(text):
        indent, kind, rest, code = match.groups()
        title = _TITLE.search(rest)
        lines = [line[len(indent) :] for line in code.splitlines()]
        number = text.count("\n", 0, match.start()) + 2
        found.append(Block(kind, title[1] if title else "", "\n".join(lines), number))
    return tuple(found)


def runs(path: Path) -> bool:
    """Whether a page shows code that is run."""
    return any(block.kind == "python" for block in blocks(path))


def is_marked(path: Path, word: str) -> bool:
    """Whether the first line of a page, a comment, has this word."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.startswith("<!--") and word in first.split()
