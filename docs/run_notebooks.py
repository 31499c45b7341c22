"""Run the notebooks of the documentation again, and keep what they print and draw: python docs/run_notebooks.py.

Each cell's printed text and its figure become its outputs. Small on purpose: no kernel, no Jupyter is needed.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt

NOTEBOOKS = Path(__file__).parent / "notebooks"


def outputs(source: str, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell, and return its outputs in the format of notebooks."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "cell", "exec"), namespace)
    found: list[dict[str, Any]] = []
    if printed.getvalue():
        found.append(
            {"output_type": "stream", "name": "stdout", "text": printed.getvalue()}
        )
    for number in plt.get_fignums():
        figure, picture = plt.figure(number), io.BytesIO()
        figure.savefig(picture, format="png", dpi=90, bbox_inches="tight")
        data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
        label = figure.axes[0].get_title() if figure.axes else ""
        found.append(
            {
                "output_type": "display_data",
                "data": data,
                "metadata": {"alt": label},
            }
        )
        plt.close(figure)
    return found


def run(path: Path) -> None:
    """Run a notebook in a folder that is thrown away, and write it with its outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    page = ModuleType("page")
    sys.modules["page"] = page
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = outputs("".join(cell["source"]), vars(page))
    path.write_text(
        json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(path)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(
        logging.ERROR
    )
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        run(path)
