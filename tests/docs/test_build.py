"""The documentation site builds, strictly, with its links checked."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ROOT


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='pip install --editable ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 45
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "{{" not in re.sub(r"<(code|pre).*?</\1>", "", text, flags=re.DOTALL), page.name
        assert 'class="arithmatex"' not in text, page.name
    # The search box works without a server.
    assert (tmp_path / "search/search_index.js").exists()
    assert "<math" in (tmp_path / "design.html").read_text(encoding="utf-8")
