"""Arms × seeds → a table with spread and CPU time: what all experiments share.

Arms of one seed run one after the other, and the cost of each is its CPU time over that of the first one, right before
it: a drift of the machine cancels. A number of a row is a median over seeds, with the least and the largest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    """

    question: str
    prepare: Callable[[int, str], Any]
    arms: Mapping[str, Callable[[Any], Numbers]]
    columns: Mapping[str, Column]
    seeds: Sequence[int] = field(default=(10, 11, 12, 13, 14))


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
