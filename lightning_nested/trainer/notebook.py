"""Tables for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(heading: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """Return a table as HTML; floats have four digits, long values are cut.

    >>> html_table(["name", "value"], [("a<b", 0.123456)])
    '<table><tr><th>name</th><th>value</th></tr><tr><td>a&lt;b</td><td>0.1235</td></tr></table>'
    """
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    head = "".join(f"<th>{escape(title)}</th>" for title in heading)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{top}<tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return escape(text if len(text) <= 80 else f"{text[:79]}…")
