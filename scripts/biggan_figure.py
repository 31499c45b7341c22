"""Sample grids of a run over time, and its scores, as one figure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.image import imread

from lightning_nested.files import replace_figure


def scores(path: Path) -> list[dict[str, Any]]:
    """Return the records of one run's ``scores.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Read a run's folder and write the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="default_root_dir of the run")
    parser.add_argument("--updates", type=int, nargs="+", default=[100, 300, 600, 1200])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    figure, axes = plt.subplots(
        1, len(arguments.updates), figsize=(2.1 * len(arguments.updates), 3.1), layout="constrained"
    )
    for axis, update in zip(axes, arguments.updates, strict=True):
        image = imread(arguments.run / "grids" / f"{update:06d}.png")
        axis.imshow(image[:, : 33 * 6 + 1])  # six of each class: wide enough to see whether they differ
        axis.set_title(f"{update} updates", fontsize=9)
        axis.set_axis_off()
    found = [record for record in scores(arguments.run / "scores.jsonl") if "agreement" in record["scores"]]
    lines = [
        f"{r['game_updates']}: agreement {r['scores']['agreement']:.2f}, distance "
        f"{r['scores']['frechet_distance']:.0f}, recall {r['scores']['recall']:.3f}"
        for r in found[-4:]
    ]
    halves = "   ".join(lines[:2]), "   ".join(lines[2:])
    figure.supxlabel("\n".join(half for half in halves if half), fontsize=8)
    replace_figure(arguments.output, figure, dpi=85)
    print(f"Wrote {arguments.output.name}")


if __name__ == "__main__":
    main()
