"""Arms × seeds → a table with spread and CPU time: what all experiments share.

Arms of one seed run one after the other, and the cost of each is its CPU time over that of the first one, right before
it: a drift of the machine cancels. A number of a row is a median over seeds, with the least and the largest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_nested.figures.style import COLOURS, open_axes, styled_figure
from lightning_nested.files import replace_figure

Numbers = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number that arms return, and how it is shown."""

    title: str
    percent: bool = False
    digits: int = 3

    def text(self, values: Sequence[float]) -> str:
        """``median [least, largest]``."""
        factor, digits = (100.0, 1) if self.percent else (1.0, self.digits)
        middle, low, high = (factor * f(values) for f in (statistics.median, min, max))
        unit = " %" if self.percent else ""
        spread = f" [{low:.{digits}f}, {high:.{digits}f}]" if len(values) > 1 else ""
        return f"{middle:.{digits}f}{unit}{spread}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Arms to compare.

    Attributes:
        question: One line.
        prepare: Function from a seed and the size, ``"smoke"`` or ``"real"``, to what each arm is given.
        arms: Functions from that to numbers, by name; costs are relative to the first.
        columns: The numbers, by key; what an arm does not return is a dash.
        seeds: Seeds that are reported; designs were chosen on others.
        across: What the columns are values of, as a label; the figure then draws a line for each arm over them.
        measure: What they then show.
    """

    question: str
    prepare: Callable[[int, str], Any]
    arms: Mapping[str, Callable[[Any], Numbers]]
    columns: Mapping[str, Column]
    seeds: Sequence[int] = field(default=(10, 11, 12, 13, 14))
    across: str = ""
    measure: str = ""


Results = dict[str, list[dict[str, float]]]


def compare(experiment: Experiment, seeds: Sequence[int], size: str, *, only: Sequence[str] = ()) -> Results:
    """Return the numbers of each arm, one mapping per seed, with ``seed``, ``seconds`` and ``cost``."""
    results: Results = {}
    for seed in seeds:
        given, unit = experiment.prepare(seed, size), None
        for name, arm in experiment.arms.items():
            if only and name not in only and unit is not None:
                continue
            before = time.process_time()
            numbers = dict(arm(given))
            seconds = time.process_time() - before
            # What an arm says of its own cost leaves out the scoring.
            seconds = numbers.pop("seconds", seconds)
            unit = seconds if unit is None else unit
            results.setdefault(name, []).append(
                {"seed": float(seed), "seconds": seconds, "cost": seconds / unit, **numbers}
            )
            print(name, {k: round(v, 4) for k, v in results[name][-1].items()}, flush=True)
    return results


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Return the probability that one of the positives (booleans) has a larger score than another entry."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive.numpy(), scores.double().numpy()))


def rows(experiment: Experiment, results: Results) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of the table."""
    columns = {**experiment.columns, "cost": Column(title="cost, × the first", digits=2)}
    seconds = Column(title="CPU seconds", digits=1)
    header = ["arm", *(c.title for c in columns.values()), seconds.title]
    cells = []
    for name, found in results.items():
        shown = [
            c.text([entry[key] for entry in found]) if key in found[0] else "–" for key, c in columns.items()
        ]
        cells.append([name, *shown, seconds.text([entry["seconds"] for entry in found])])
    return header, cells


def figure(path: Path, experiment: Experiment, results: Results) -> None:
    """Draw the first column over the cost, or an experiment's columns ``across`` something."""
    draw = _lines if experiment.across else _points
    with styled_figure(9.5, 4.0, layout="constrained") as drawn:
        draw(drawn.subplots(), experiment, results)
        replace_figure(path, drawn, dpi=110)


def _lines(axes: Any, experiment: Experiment, results: Results) -> None:
    """Draw a line for each arm over the columns, with a band from the least to the largest seed."""
    open_axes(axes, experiment.question.split(",")[0], experiment.across, experiment.measure)
    shown = [key for key in experiment.columns if all(key in found[0] for found in results.values())]
    places = range(len(shown))
    for (name, found), colour, dashes in zip(results.items(), cycle(COLOURS), _dashes(len(results))):
        values = [[entry[key] for entry in found] for key in shown]
        axes.plot(places, [statistics.median(v) for v in values], color=colour, linestyle=dashes, label=name)
        axes.fill_between(
            places, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.12
        )
    highest = max(
        statistics.median(entry[key] for entry in found) for found in results.values() for key in shown
    )
    lowest = min(entry[key] for found in results.values() for entry in found for key in shown)
    if highest > 2 * lowest:
        axes.set_yscale("log")
    axes.set_xticks(places, [experiment.columns[key].title for key in shown])
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _dashes(count: int) -> list[str]:
    """Return styles that tell lines apart whose colours come again."""
    return ["-" if i < len(COLOURS) else "--" for i in range(count)]


def _points(axes: Any, experiment: Experiment, results: Results) -> None:
    """Draw the first column that the first arm has over the cost: a point with its ranges for each arm that has it."""
    first = next(iter(results.values()))[0]
    key, column = next((key, column) for key, column in experiment.columns.items() if key in first)
    factor = 100.0 if column.percent else 1.0
    title = experiment.question.split(",")[0]
    open_axes(axes, title, "CPU time, × the first arm", column.title + (" (%)" if column.percent else ""))
    axes.set_xscale("log")
    for (name, found), colour in zip(results.items(), cycle(COLOURS)):
        if key not in found[0]:
            continue
        costs = [entry["cost"] for entry in found]
        values = [factor * entry[key] for entry in found]
        x, y = statistics.median(costs), statistics.median(values)
        axes.plot([min(costs), max(costs)], [y, y], color=colour, alpha=0.5)
        axes.plot([x, x], [min(values), max(values)], color=colour, alpha=0.5)
        axes.plot(x, y, "o", color=colour, label=name)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
