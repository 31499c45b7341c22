"""What MkDocs does beyond its plugins: figures by name, formulas as MathML, notebooks as pages, links checked."""

from __future__ import annotations

import base64
import json
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from links import broken_links  # noqa: E402 - beside this file, which MkDocs loads from its path
from quotes import filled  # noqa: E402

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)

_CODE = re.compile(r"(<pre\b.*?</pre>|<code\b.*?</code>)", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in figures and tables."""
    try:
        return filled(markdown)
    except ValueError as error:
        raise PluginError(str(error)) from error


def on_page_content(html: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers draw by themselves; keep numbers and units, and ranges, together."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(unescape(match[3]), display=display)

    parts = _CODE.split(_FORMULA.sub(formula, html))
    parts[::2] = [
        re.sub(r"(?<=\d) (?=%|\d{3}\b)|(?<=\d,) (?=[\d.]+\])", "\u00a0", part)
        for part in parts[::2]
    ]
    return "".join(parts)


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each notebook, with its saved outputs."""
    for path in sorted((DOCS / "notebooks").glob("*.ipynb")):
        name = f"notebooks/{path.stem}"
        text, images = notebook_page(
            json.loads(path.read_text(encoding="utf-8")), path.stem
        )
        files.append(File.generated(config, f"{name}.md", content=text))
        for image, data in images.items():
            files.append(File.generated(config, f"notebooks/{image}", content=data))
    return files


def on_post_build(config: Any, **_: Any) -> None:
    """Check the links and anchors of the built pages, also those that docstrings and the theme have made."""
    if broken := broken_links(Path(config.site_dir)):
        raise PluginError("\n".join(broken))


def notebook_page(
    notebook: dict[str, Any], stem: str
) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                image = f"{stem}_{len(images) + 1}.png"
                images[image] = base64.b64decode("".join(data["image/png"]))
                parts.append(
                    f"![{output.get('metadata', {}).get('alt', 'Output of the cell above')}]({image})"
                )
            elif text := "".join(
                output.get("text", data.get("text/plain", ""))
            ).rstrip():
                parts.append(f"```text\n{text}\n```")
    # The first cell begins with the title.
    parts.insert(1, f"This page is a notebook: [download it]({stem}.ipynb).")
    return "\n\n".join(parts) + "\n", images
