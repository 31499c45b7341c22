"""Quotes in pages: figures by name, from figures.yml, and tables of results.md, by heading and number, also drawn.

{{ callback_cost }}                                    the figure of that name
{{ table "The main job" }}                             the first table below that heading
{{ table "Against search" 2 columns 1 3 }}             the second, its first and third column
{{ bars "One hypergradient" 1 columns 2 3 rows "CG" }} the CG rows: bars of column 3 beside column 2
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import yaml

DOCS = Path(__file__).parent
FIGURE = re.compile(r"\{\{ *(\w+) *\}\}")
TABLE = re.compile(r'\{\{ *table "([^"]+)"(?: (\d+))?(?: columns ([\d ]+?))? *\}\}')

BARS = re.compile(
    r'\{\{ *bars "([^"]+)" (\d+) columns (\d+) (\d+)(?: rows "([^"]+)")? *\}\}'
)


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


def bars(
    heading: str, number: int, label: int, value: int, first: str | None = None
) -> str:
    """Return a bar for each row of a table of results.md, as HTML that fits a phone and a dark page.

    Args:
        heading: Heading above the table.
        number: Which table below it.
        label: Column beside the bars, from 1.
        value: Column whose first number is the length.
        first: Beginning of the first column of the rows that are drawn; None: all rows.

    Raises:
        ValueError: There is no such table, or no number to draw.
    """
    lines = table(heading, number).splitlines()
    rows = [
        [cell.strip(" *") for cell in re.split(r"(?<!\\)\|", row)] for row in lines
    ]
    found = [
        (row[label].replace("`", ""), float(match[0]))
        for row in rows[2:]
        if first is None or row[1].startswith(first)
        if (match := re.search(r"\d+(\.\d+)?", row[value]))
    ]
    if not found:
        raise ValueError(
            f"Column {value} below {heading!r} must have numbers. Got none in the rows of {first!r}."
        )
    longest = max(length for _, length in found)
    drawn = "\n".join(
        f'<span>{escape(name)}</span><i style="--share: {length / longest:.4f}">{length:g}</i>'
        for name, length in found
    )
    title = escape(re.sub(r" \[.*", "", rows[0][value]).replace("`", ""))
    return f'<div class="bars" role="img" aria-label="{title}">\n<b>{title}</b>\n{drawn}\n</div>\n'


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
    text = BARS.sub(
        lambda match: bars(
            match[1], int(match[2]), int(match[3]), int(match[4]), match[5]
        ),
        text,
    )
    return FIGURE.sub(figure, text)
