"""The code of each page of the documentation runs, in the order of the page, as a reader would run it.

Blocks that begin with ```python are run in one namespace; ```py marks code of other libraries, which is only shown.
A block with a title is a file: it is written before what follows. In a page whose first line is `<!-- shell -->`
the commands of ```bash run too. `<!-- slow -->` leaves a page to `-m slow`.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import pytest

from lightning_nested.cli.main import main
from tests.command import ROOT
from tests.docs.pages import DOCS, Block, blocks, is_marked, markdown_pages, notebooks, runs


def cases() -> list[Any]:
    pages = [path for path in (*markdown_pages(), *notebooks()) if runs(path)]
    return [
        pytest.param(
            path,
            id=path.relative_to(ROOT).as_posix(),
            marks=[pytest.mark.slow] if is_marked(path, "slow") else [],
        )
        for path in pages
    ]


def run_block(block: Block, path: Path, namespace: dict[str, Any], *, shell: bool) -> None:
    if block.title:
        Path(block.title).write_text(block.code + "\n", encoding="utf-8")
    elif block.kind == "python":
        # Empty lines before it, so that an error names the line of the page.
        source = "\n" * (block.line - 1) + block.code
        if path.suffix == ".ipynb":
            # Its plots need a longer run than a test does.
            source = re.sub(r"max_epochs=\d+", "max_epochs=3", source)
        exec(compile(source, str(path), "exec", dont_inherit=True), namespace)
    elif block.kind == "bash" and shell:
        for line in block.code.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line, comments=True) or [""]
            if program == "lightning-nested":
                main(arguments)


@pytest.mark.parametrize("path", cases())
@pytest.mark.usefixtures("own_folder")
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")
def test_the_code_of_a_page_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mpl.rcParams, "backend", "agg")
    # A module: dataclasses and pickles look up their classes' module by name.
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    for block in blocks(path):
        run_block(block, path, vars(page), shell=is_marked(path, "shell"))


def test_each_guide_has_code_that_runs() -> None:
    guides = [*(DOCS / "guides").glob("*.md"), *(DOCS / "coming_from").glob("*.md")]
    assert len(guides) > 15
    without = {path.name for path in guides if not runs(path)}
    assert without <= {"index.md", "processes.md"}
