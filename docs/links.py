"""Checks the built pages: links lead to files of the site, anchors to elements; nothing is fetched from elsewhere."""

from __future__ import annotations

from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class _Link(NamedTuple):
    url: str
    fetched: bool  # by the page itself; else only when a reader follows it


class _Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[_Link] = []
        self.anchors = {"", "__top"}
        self.feed(text)

    def handle_starttag(
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None:
        fetched = tag != "a" and ("rel", "canonical") not in attrs
        for name, value in attrs:
            if name in {"href", "src"} and value:
                self.links.append(_Link(value, fetched))
            elif name == "id" and value:
                self.anchors.add(value)


@cache
def _read(path: Path) -> _Page:
    return _Page(path.read_text(encoding="utf-8"))


def _fault(page: Path, link: _Link) -> str:
    """Return what is wrong with a link, or "". Other sites are not asked."""
    target = urlsplit(link.url)
    if target.scheme or target.netloc:
        return (
            "is fetched from elsewhere"
            if link.fetched and target.scheme != "data"
            else ""
        )
    file = (page.parent / unquote(target.path)).resolve() if target.path else page
    if not file.is_file():
        return "leads to no file"
    if target.fragment and unquote(target.fragment) not in _read(file).anchors:
        return "has an anchor that is not in its page"
    return ""


def broken_links(site: Path) -> list[str]:
    """Return a sentence for each link in the pages of a folder that leads nowhere, or fetches from another site."""
    site = site.resolve()
    _read.cache_clear()
    return [
        f"{link.url} in {page.relative_to(site)} {fault}."
        for page in sorted(site.rglob("*.html"))
        # The links of 404.html are from the server's root.
        if page.name != "404.html"
        for link in _read(page).links
        if (fault := _fault(page, link))
    ]
