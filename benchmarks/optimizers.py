"""What a step of each optimizer costs, in units of torch's fused Adam on the same tensors.

A step is bound by memory: Adam reads and writes seven numbers per parameter, as complex momentum does; complex Adam
nine. The unit is measured right before every contestant. ``--torch-compile`` adds the same update through
``torch.compile``, which takes its time to compile.
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
    "OptimisticSGD": lambda p: OptimisticSGD(p, 0.01),
    "OptimisticAdam": lambda p: OptimisticAdam(p),
    "ExtrapolationFromThePast": lambda p: ExtrapolationFromThePast(p, 0.01),
    "Extragradient, both halves": lambda p: Extragradient(p, 0.01),
}
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


class TorchCompiled:
    """Complex momentum through torch.compile, some tensors a call, with scalars that do not recompile."""

    def __init__(self, params: list[Tensor], adam: bool = False, block: int = 20) -> None:
        self.params, self.adam, self.block = params, adam, block
        self.state = [[torch.zeros_like(p) for p in params] for _ in range(3 if adam else 2)]
        c, s = coefficient(0.8, 0.39269908169872414)
        self.scalars = torch.tensor([c, s, 0.01, 0.999, 1e-8])
        self.kernel = torch.compile(_adam if adam else _sgd, fullgraph=True, dynamic=True)

    @torch.no_grad()
    def step(self) -> None:
        """Blocks of tensors; each block is one graph."""
        grads = [p.grad for p in self.params]
        for i in range(0, len(self.params), self.block):
            j = i + self.block
            self.kernel(self.params[i:j], grads[i:j], *(b[i:j] for b in self.state), self.scalars)


def _sgd(ws: list[Tensor], gs: list[Tensor], reals: list[Tensor], imags: list[Tensor], h: Tensor) -> None:
    c, s, lr, _, _ = h.unbind()
    for w, g, a, b in zip(ws, gs, reals, imags, strict=True):
        new, turned = c * a - s * b + g, s * a + c * b
        a.copy_(new)
        b.copy_(turned)
        w.sub_(lr * new)


def _adam(
    ws: list[Tensor],
    gs: list[Tensor],
    reals: list[Tensor],
    imags: list[Tensor],
    squares: list[Tensor],
    h: Tensor,
) -> None:
    c, s, lr, keep, eps = h.unbind()
    for w, g, a, b, v in zip(ws, gs, reals, imags, squares, strict=True):
        new, turned, square = c * a - s * b + g, s * a + c * b, keep * v + (1 - keep) * g * g
        a.copy_(new)
        b.copy_(turned)
        v.copy_(square)
        w.sub_(lr * new / (square.sqrt() + eps))


def tensors(count: int, elements: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters with gradients, the same every time."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(elements, generator=generator).to(dtype).requires_grad_() for _ in range(count)]
    for p in params:
        p.grad = torch.randn(elements, generator=generator).to(dtype).mul_(0.01)
    return params


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
        makers["complex SGD, torch.compile"] = TorchCompiled
        makers["complex Adam, torch.compile"] = lambda p: TorchCompiled(p, adam=True)
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
            "error_to_float64": error(OURS[name]) if name in OURS else None,
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
    print("\nReach: ComplexSGD <= 1.4, ComplexAdam <= 1.9.")
    report(arguments, results, load_before=before)
    return results


if __name__ == "__main__":
    main()
