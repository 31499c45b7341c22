"""What a step of each optimizer costs, in units of torch's fused Adam on the same tensors.

A step is bound by memory: Adam reads and writes seven numbers per parameter, as complex momentum does; complex Adam
nine. The unit is measured right before every contestant. ``--torch-compile`` adds ``torch.compile(optimizer.step)``,
which takes its time to compile.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _measuring import Call, interleave, live_memory, load, parser, print_table, report, start
from torch import Tensor

from lightning_nested.optim import (
    ComplexAdam,
    ComplexSGD,
    Extragradient,
    ExtrapolationFromThePast,
    OptimisticAdam,
    OptimisticSGD,
)
from lightning_nested.optim.options import coefficient

Make = Callable[[list[Tensor]], Any]
OURS: dict[str, Make] = {
    "ComplexSGD": lambda p: ComplexSGD(p, 0.01),
    "ComplexSGD, phase 0": lambda p: ComplexSGD(p, 0.01, phase=0.0),
    "ComplexAdam": lambda p: ComplexAdam(p),
    "ComplexAdam, debias": lambda p: ComplexAdam(p, debias=True),
    "OptimisticSGD": lambda p: OptimisticSGD(p, 0.01),
    "OptimisticAdam": lambda p: OptimisticAdam(p),
    "ExtrapolationFromThePast": lambda p: ExtrapolationFromThePast(p, 0.01),
    "Extragradient, both halves": lambda p: Extragradient(p, 0.01),
}
COMPILED: tuple[str, ...] = ("ComplexSGD", "ComplexAdam", "ComplexAdam, debias", "OptimisticAdam")
THEIRS: dict[str, Make] = {
    "torch SGD, momentum, fused": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, fused=True),
    "torch SGD, momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "torch Adam": lambda p: torch.optim.Adam(p),
    "torch Adam, foreach": lambda p: torch.optim.Adam(p, foreach=True),
}


class ComplexBuffer:
    """The method as it is usually written down, with one complex buffer."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.beta = complex(*coefficient(0.8, 0.39269908169872414))
        self.buffers = [torch.zeros(p.shape, dtype=torch.complex64) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        """μ ← βμ − g, w ← w + lr·Re μ."""
        for p, mu in zip(self.params, self.buffers, strict=True):
            mu.mul_(self.beta).sub_(p.grad)
            p.add_(mu.real, alpha=0.01)


def tensors(count: int, elements: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters with gradients, the same every time."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(elements, generator=generator).to(dtype).requires_grad_() for _ in range(count)]
    for p in params:
        p.grad = torch.randn(elements, generator=generator).to(dtype).mul_(0.01)
    return params


class Compiled:
    """An optimizer whose step is one graph of Inductor."""

    def __init__(self, optimizer: Any) -> None:
        self.step = torch.compile(optimizer.step, fullgraph=True)


def through_torch_compile(make: Make) -> Make:
    return lambda params: Compiled(make(params))


def step_of(optimizer: Any) -> Call:
    """One update; of extragradient both halves, without the second gradient."""
    if not isinstance(optimizer, Extragradient):
        return optimizer.step  # type: ignore[no-any-return]

    def both() -> None:
        optimizer.extrapolate()
        optimizer.step()

    return both


def error(make: Make) -> float:
    """Largest difference to the same optimizer in float64, over the largest change, after five steps."""
    moved = []
    start = tensors(3, 1000, torch.float64)
    for dtype in (torch.float32, torch.float64):
        params = tensors(3, 1000, dtype)
        step = step_of(make(params))
        for _ in range(5):
            step()
        moved.append([p.detach().double() - q.detach() for p, q in zip(params, start, strict=True)])
    size = max(float(d.abs().max()) for d in moved[1])
    return max(float((a - b).abs().max()) for a, b in zip(*moved, strict=True)) / size


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    options = parser(__doc__, rounds=21)
    options.add_argument("--tensors", type=int, default=100)
    options.add_argument("--elements", type=int, default=80_000, help="of each tensor")
    options.add_argument(
        "--torch-compile", action="store_true", help="add it; compiling takes about a minute"
    )
    options.add_argument("--only", default="", help="contestants with this in their name")
    arguments: argparse.Namespace = options.parse_args(argv)
    start(arguments)
    before = load()

    def params() -> list[Tensor]:
        return tensors(arguments.tensors, arguments.elements)

    makers = {**THEIRS, "complex SGD, one complex64 buffer": ComplexBuffer, **OURS}
    if arguments.torch_compile:
        makers |= {f"{name}, torch.compile": through_torch_compile(OURS[name]) for name in COMPILED}
    makers = {name: make for name, make in makers.items() if arguments.only in name}
    calls = {name: step_of(make(params())) for name, make in makers.items()}
    first: dict[str, float] = {}
    for name, call in calls.items():  # where a kernel is compiled, this is what it takes
        begin = time.perf_counter()
        call()
        first[name] = time.perf_counter() - begin
    times = interleave(
        calls,
        {"fused Adam": torch.optim.Adam(params(), fused=True).step},
        rounds=arguments.rounds,
        threads=arguments.threads,
        warmup=3,
        contestant_repeats=3,  # the second call in a row finds pages and caches as the unit's did
    )
    results: dict[str, dict[str, Any]] = {}
    for name, timing in times.items():
        results[name] = {
            "time_over_fused_adam": timing.units["fused Adam"],
            "milliseconds": 1e3 * timing.seconds.median,
            "first_step_seconds": first[name],
            "temporaries_mib": live_memory(calls[name]) / 2**20,
            "error_to_float64": error(makers[name]) if name.partition(", torch")[0] in OURS else None,
        }
    rows = [
        [
            name,
            entry["time_over_fused_adam"].text(),
            f"{entry['milliseconds']:.2f}",
            f"{entry['first_step_seconds']:.2f}",
            f"{entry['temporaries_mib']:.1f}",
            "-" if entry["error_to_float64"] is None else f"{entry['error_to_float64']:.0e}",
        ]
        for name, entry in results.items()
    ]
    header = [
        f"{arguments.tensors} tensors of {arguments.elements}",
        "fused Adam = 1 [quartiles]",
        "ms",
        "first step, s",
        "temporaries, MiB",
        "error to float64",
    ]
    print_table(header, rows)
    print("\nReach: ComplexSGD <= 1.4, ComplexAdam <= 1.9; with torch.compile 1.15 and 1.5.")
    report(arguments, results, load_before=before)
    return results


if __name__ == "__main__":
    main()
