"""What makes docstrings readable as Markdown: doctests as code, roles such as ``:class:`` as links, indices set low."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import griffe

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from formulas import with_indices  # noqa: E402 - beside this file, which griffe loads from its path

_REFERENCE = DOCS / "reference"
_ROLE = re.compile(r":\w+:`~?([\w.]+)(?:\(\))?`")


@cache
def public_names() -> dict[str, str]:
    """Return the full path of each name that the reference describes."""
    text = "".join(
        path.read_text(encoding="utf-8") for path in sorted(_REFERENCE.glob("*.md"))
    )
    return {
        path.rsplit(".", 1)[-1]: path
        for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    }


def with_links(text: str) -> str:
    """Turn roles into links where the reference has the name, else into code."""

    def link(match: re.Match[str]) -> str:
        name = match[1].rsplit(".", 1)[-1]
        return (
            f"[`{name}`][{public_names()[name]}]"
            if name in public_names()
            else f"`{name}`"
        )

    return _ROLE.sub(link, text)


def with_fences(text: str) -> str:
    """Put a fence around each doctest, with its output, up to the next empty line."""
    lines: list[str] = []
    indent: str | None = None
    for line in text.splitlines():
        if indent is None and line.lstrip().startswith(">>> "):
            indent = line[: len(line) - len(line.lstrip())]
            lines += ["", f"{indent}```pycon"]
        elif indent is not None and not line.strip():
            lines.append(f"{indent}```")
            indent = None
        lines.append(line)
    if indent is not None:
        lines.append(f"{indent}```")
    return "\n".join(lines)


class ReadableDocstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            # In an "Example:" section of Google style the fences are those of the section itself.
            obj.docstring.value = with_fences(
                with_links(with_indices(obj.docstring.value))
            )
