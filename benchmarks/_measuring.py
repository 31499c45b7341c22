"""How every benchmark here measures: interleaved rounds, ratios inside a round, medians and quartiles.

A contestant's time is divided by that of a unit measured right before it, in the same round, so that a
machine that slows down slows both. One thread is timed by the process's CPU time, which does not see other
programs; several by the wall clock. Memory is the exact peak of live tensor bytes from the profiler's
record of every allocation.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_nested.files import replace_text

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler announces itself on stderr otherwise
import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The quartiles are the extremes where there are fewer than four values."""
        if len(values) < 4:
            return cls(statistics.median(values), min(values), max(values))
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)

    def text(self, digits: int = 2) -> str:
        """``median [lower, upper]``."""
        return f"{self.median:.{digits}f} [{self.lower:.{digits}f}, {self.upper:.{digits}f}]"


@dataclass(frozen=True)
class Timing:
    """A contestant over all rounds: seconds, and multiples of each unit."""

    seconds: Spread
    units: Mapping[str, Spread]


def parser(description: str | None, *, rounds: int = 9) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    result = argparse.ArgumentParser(
        description=(description or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument(
        "--rounds", type=int, default=rounds, help="repetitions; every contestant runs in each"
    )
    result.add_argument("--threads", type=int, default=1, help="1: CPU time; more: wall time")
    result.add_argument(
        "--output", type=Path, default=None, help="JSON file to write, beside the printed table"
    )
    return result


def clock(threads: int) -> Callable[[], float]:
    """CPU time of the process with one thread, wall time with several."""
    return time.process_time if threads == 1 else time.perf_counter


def interleave(
    contestants: Mapping[str, Call],
    units: Mapping[str, Call],
    *,
    rounds: int,
    threads: int,
    warmup: int = 2,
    repeats: int = 3,
    contestant_repeats: int = 1,
) -> dict[str, Timing]:
    """Time every contestant in every round, each right after the units: medians of consecutive calls.

    Args:
        contestants: Calls by name.
        units: What their times are divided by.
        rounds: Of all contestants.
        threads: One: CPU time; more: wall time.
        warmup: Calls of each before the first round.
        repeats: Consecutive calls of a unit.
        contestant_repeats: Of a contestant. As many as of the unit where a call is so short that it matters whether
            its memory was touched just before.
    """
    now = clock(threads)

    def elapsed(call: Call) -> float:
        start = now()
        call()
        return now() - start

    for call in (*units.values(), *contestants.values()):
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    ratios: dict[str, dict[str, list[float]]] = {name: {u: [] for u in units} for name in contestants}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in contestants.items():
                unit = {u: statistics.median(elapsed(c) for _ in range(repeats)) for u, c in units.items()}
                seconds[name].append(statistics.median(elapsed(call) for _ in range(contestant_repeats)))
                for u, size in unit.items():
                    ratios[name][u].append(seconds[name][-1] / size)
                gc.collect()
    finally:
        gc.enable()
    return {
        name: Timing(Spread.of(seconds[name]), {u: Spread.of(r) for u, r in ratios[name].items()})
        for name in contestants
    }


def live_memory(call: Call) -> int:
    """Most bytes of tensors alive at once that ``call`` allocated itself; deterministic."""
    call()  # caches and lazy allocations
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    handle, path = tempfile.mkstemp(suffix=".json")
    os.close(handle)
    try:
        record.export_chrome_trace(path)
        trace = json.loads(Path(path).read_text())
    finally:
        os.unlink(path)
    events = [e for e in trace["traceEvents"] if e.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: float(e["ts"])):
        now += int(event["args"]["Bytes"])
        peak = max(peak, now)
    return peak


def start(arguments: argparse.Namespace) -> None:
    """Set the threads, and flush vanishing numbers, which would slow every product."""
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """What the figures depend on; nothing that names a host or a path."""
    versions = {"python": platform.python_version()}
    versions.update({name: _version(name) for name in ("torch", "lightning", *packages)})
    return {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system(), "versions": versions}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table, to be read and to be copied."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    print(
        "\n"
        + "\n".join(
            "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in lines
        )
    )


def report(
    arguments: argparse.Namespace,
    results: Mapping[str, Any],
    *,
    packages: Sequence[str] = (),
    load_before: float,
) -> None:
    """Write the JSON file that was asked for: results, machine, versions, load and the command."""
    if arguments.output is None:
        return
    whole = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_options(sys.argv[1:])]),
        "machine": machine(packages),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "load_average": {"before": load_before, "after": load()},
        "results": results,
    }
    replace_text(arguments.output, json.dumps(whole, indent=1, default=_plain) + "\n")
    print(f"\nWrote {arguments.output.name}")


def load() -> float:
    """Load average of the last minute: what else runs here."""
    return round(os.getloadavg()[0], 2)


def _options(arguments: Sequence[str]) -> list[str]:
    """Options without the folders of this machine."""
    return [Path(a).name if os.sep in a else a for a in arguments]


def _plain(value: Any) -> Any:
    if isinstance(value, (Spread, Timing)):
        return asdict(value)
    if isinstance(value, torch.Tensor):
        return value.tolist()
    raise TypeError(f"A result must be plain data. Got {type(value).__name__}.")
