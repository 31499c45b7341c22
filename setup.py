"""The long description: README.md without links that lead nowhere outside of the repository."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# [text](path) and ![text](path); what has a scheme or is an anchor stays.
RELATIVE = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<path>[^)\s]+)\)")


def described(readme: str, source: str | None) -> str:
    """Return the text with absolute links into the repository; without its address only their words are left."""

    def absolute(link: re.Match[str]) -> str:
        if source is None:
            return "" if link["image"] else link["text"]
        return f"{link['image']}[{link['text']}]({source}/{'raw' if link['image'] else 'blob'}/main/{link['path']})"

    return RELATIVE.sub(absolute, readme)


def main() -> None:
    """Read the address under [project.urls] by hand: Python 3.10 has no tomllib."""
    urls = re.search(
        r'^Source = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=described(readme, urls[1] if urls else None),
        long_description_content_type="text/markdown",
    )


# setuptools runs this file under this name too.
if __name__ == "__main__":
    main()
