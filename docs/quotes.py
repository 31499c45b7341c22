"""Quotes in pages: figures by name, from figures.yml, and tables of results.md, by heading and number.

{{ callback_cost }}                                    the figure of that name
{{ table "The main job" }}                             the first table below that heading
{{ table "Against search" 2 columns 1 3 }}             the second, its first and third column
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

DOCS = Path(__file__).parent
FIGURE = re.compile(r"\{\{ *(\w+) *\}\}")
TABLE = re.compile(r'\{\{ *table "([^"]+)"(?: (\d+))?(?: columns ([\d ]+?))? *\}\}')


def figures() -> dict[str, str]:
    """Return the measured figures that pages quote by name."""
    found = yaml.safe_load((DOCS / "figures.yml").read_text(encoding="utf-8"))
    return {name: str(value) for name, value in found.items()}


def table(heading: str, number: int = 1, columns: str | None = None) -> str:
    """Return a table of results.md.

    Raises:
        ValueError: There is no such heading, or not so many tables below it.
    """
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    parts = re.split(rf"^##+ {re.escape(heading)}\n", text, flags=re.MULTILINE)
    if len(parts) != 2:
        raise ValueError(
            f"A quoted heading must be in docs/results.md once. Got {heading!r}, {len(parts) - 1} times."
        )
    section = re.split(r"^##+ ", parts[1], flags=re.MULTILINE)[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    if len(tables) < number:
        raise ValueError(
            f"{heading!r} in docs/results.md must have {number} tables. Got {len(tables)}."
        )
    if columns is None:
        return tables[number - 1]
    wanted = [int(column) for column in columns.split()]
    rows = []
    for row in tables[number - 1].splitlines():
        # A bar inside a cell is written \|.
        cells = re.split(r"(?<!\\)\|", row)
        rows.append("|" + "|".join(cells[column] for column in wanted) + "|")
    return "\n".join(rows) + "\n"


def filled(text: str) -> str:
    """Replace all quotes in a page by what they stand for.

    Raises:
        ValueError: A figure or table that does not exist.
    """
    known = figures()

    def figure(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise ValueError(
                f"{match[0]} must be a name of docs/figures.yml. Got none of that name."
            )
        return known[match[1]]

    text = TABLE.sub(
        lambda match: table(match[1], int(match[2] or 1), match[3]), text
    )
    return FIGURE.sub(figure, text)
