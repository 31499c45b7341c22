"""Curves of a run, from what its TensorBoard logger wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_nested.figures.style import COLOURS, open_axes, styled_figure
from lightning_nested.files import replace_figure


def main() -> None:
    """Read a run's log folder and write the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/digits/version_0")
    parser.add_argument("--losses", nargs="+", default=["train_loss", "val_loss"])
    parser.add_argument("--accuracy", default="val_accuracy")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    events = EventAccumulator(str(arguments.run)).Reload()
    with styled_figure(9.6, 4.2, dpi=100, layout="constrained") as figure:
        losses, accuracy = figure.subplots(1, 2)
        for name, colour in zip(arguments.losses, COLOURS, strict=False):
            found = events.Scalars(name)
            losses.plot([e.step for e in found], [e.value for e in found], color=colour, lw=1.6, label=name)
        losses.set_yscale("log")
        found = events.Scalars(arguments.accuracy)
        values = [100 * e.value for e in found]
        accuracy.plot([e.step for e in found], values, color=COLOURS[0], lw=1.6, label=arguments.accuracy)
        open_axes(losses, "Losses", "training step", "cross-entropy (nats)")
        open_axes(accuracy, "Accuracy", "training step", "right (%)")
        for axes in (losses, accuracy):
            axes.legend()
    replace_figure(arguments.output, figure, dpi=100)
    print(f"Wrote {arguments.output.name}")


if __name__ == "__main__":
    main()
