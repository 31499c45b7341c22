"""What an exponent of a running training costs, as a multiple of one plain SGD step.

The unit is one forward, backward and ``SGD.step()``. A contestant is the same step with k tangents followed; its cost
per exponent is (time − unit) / (k · unit). Peers: a loop of forward-mode products (``torch.func.jvp`` of the gradient),
the same products under ``vmap``, and k perturbed copies of the run, whose growth is a finite difference. The float64
growth of the same tangents over the same step is the reference of the error.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from _measuring import Spread, Timing, interleave, load, parser, print_table, report, start
from torch import Tensor, nn

from lightning_nested.dynamics import TrainingTracker
from lightning_nested.dynamics.frames import orthonormalize
from lightning_nested.hypergradient.vectors import flatten, unflatten


class Problem:
    """A tanh MLP and one batch, its weights put back before each measurement."""

    def __init__(
        self, widths: Sequence[int], batch: int, rate: float, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Linear(a, b), *([nn.Tanh()] if i < len(widths) - 2 else [])]
        self.net = nn.Sequential(*layers).to(dtype)
        self.x, self.y = torch.randn(batch, widths[0]).to(dtype), torch.randint(0, widths[-1], (batch,))
        self.names = [n for n, _ in self.net.named_parameters()]
        self.params = tuple(self.net.parameters())
        self.n, self.rate = sum(p.numel() for p in self.params), rate
        self.optimizer = torch.optim.SGD(self.params, lr=rate)

    def loss(self) -> Tensor:
        """Cross-entropy of the batch."""
        return nn.functional.cross_entropy(self.net(self.x), self.y)

    def functional(self, *params: Tensor) -> Tensor:
        """The same as a function of the weights."""
        out = torch.func.functional_call(self.net, dict(zip(self.names, params, strict=True)), (self.x,))
        return nn.functional.cross_entropy(out, self.y)

    def step(self, hook: Callable[[Tensor], None] | None = None) -> None:
        """One plain step; ``hook`` sees the loss before its backward pass."""
        self.optimizer.zero_grad()
        loss = self.loss()
        if hook is not None:
            hook(loss)
        loss.backward()
        self.optimizer.step()


def kept_graph(problem: Problem, k: int, every: int, *, reuse: bool = False) -> Callable[[], object]:
    """Ours: the graph of the gradient kept, all products from it; ``reuse``: its gradient in place of a backward."""
    tracker = TrainingTracker(problem.params, k=k, align=0, orthonormalize_every=every)

    def call() -> None:
        problem.optimizer.zero_grad()
        loss = problem.loss()
        tracker.observe(loss, lr=problem.rate)
        if reuse:
            for p, g in zip(problem.params, tracker.gradient, strict=True):
                p.grad = g
        else:
            loss.backward()
        tracker.advance(problem.optimizer)
        problem.optimizer.step()

    return call


def forward_mode(problem: Problem, k: int, *, batched: bool) -> Callable[[], object]:
    """Peers: forward-mode over reverse-mode, one tangent after the other or all under ``vmap``; QR in every step."""
    frame = random_rows(problem, k)
    gradient = torch.func.grad(problem.functional, argnums=tuple(range(len(problem.params))))

    def product(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.func.jvp(gradient, tuple(p.detach() for p in problem.params), v)[1]
        return result

    def call() -> None:
        nonlocal frame
        if batched:
            tangents = tuple(
                f.view(k, *p.shape)
                for f, p in zip(
                    frame.split([p.numel() for p in problem.params], 1), problem.params, strict=False
                )
            )
            pushed = torch.cat([p.reshape(k, -1) for p in torch.vmap(product)(tangents)], 1)
        else:
            pushed = torch.stack([flatten(product(unflatten(f, problem.params))) for f in frame])
        q, r = torch.linalg.qr((frame - problem.rate * pushed).mT)
        r.diagonal().abs().log()
        frame = q.mT.contiguous()
        problem.step()

    return call


def perturbed(problem: Problem, k: int, size: float) -> Callable[[], object]:
    """Peer: k copies of the weights moved by ``size``, each with a gradient step of its own; QR of the differences."""
    frame = random_rows(problem, k)

    def call() -> None:
        nonlocal frame
        before = [p.detach().clone() for p in problem.params]
        problem.step()
        after = flatten(p.detach() for p in problem.params)
        moved = []
        for row in frame:
            pieces = unflatten(row, problem.params)
            ahead = [(b + size * d).requires_grad_(True) for b, d in zip(before, pieces, strict=True)]
            gradient = torch.autograd.grad(problem.functional(*ahead), ahead)
            moved.append(
                flatten(a.detach() - problem.rate * g for a, g in zip(ahead, gradient, strict=True)) - after
            )
        q, r = torch.linalg.qr((torch.stack(moved) / size).mT)
        r.diagonal().abs().log()
        frame = q.mT.contiguous()

    return call


def random_rows(problem: Problem, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return orthonormalize(torch.randn(k, problem.n, generator=generator))[0].contiguous()


def accuracy(
    widths: Sequence[int], batch: int, rate: float, k: int, every: int, steps: int
) -> dict[str, float]:
    """Largest difference of a running exponent over ``steps`` steps, float32 every ``every`` steps, to float64."""
    found = {}
    frame: Tensor | None = None
    for dtype, spaced in ((torch.float64, 1), (torch.float32, 1), (torch.float32, every)):
        problem = Problem(widths, batch, rate, dtype)
        tracker = TrainingTracker(problem.params, k=k, align=3 * k, orthonormalize_every=spaced)
        if frame is not None:
            tracker.frame = frame.to(dtype).clone()
        for _ in range(steps):
            problem.optimizer.zero_grad()
            loss = problem.loss()
            tracker.observe(loss, lr=rate)
            if frame is None and tracker.frame is not None:
                frame = tracker.frame.clone()
                found["alignment"] = tracker.alignment
            loss.backward()
            tracker.advance(problem.optimizer)
            problem.optimizer.step()
        if dtype == torch.float64:
            reference = tracker.running()
        else:
            found[f"float32, every {spaced}"] = float((tracker.running().double() - reference).abs().max())
    found["top exponent"] = float(reference[0])
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, rounds=9)
    options.add_argument("--widths", type=int, nargs="+", default=[784, 500, 500, 10])
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--rate", type=float, default=0.1)
    options.add_argument("--every", type=int, default=5, help="steps between orthonormalisations of ours")
    options.add_argument("--ks", type=int, nargs="+", default=[1, 8])
    options.add_argument("--steps", type=int, default=20, help="of the accuracy run")
    arguments: argparse.Namespace = options.parse_args(argv)
    start(arguments)
    before = load()
    results: dict[str, Any] = {}
    rows = []
    for k in arguments.ks:
        problem = Problem(arguments.widths, arguments.batch, arguments.rate)
        every = arguments.every

        def several(call: Callable[[], object], every: int = every) -> Callable[[], object]:
            def run() -> None:
                for _ in range(every):  # whole windows, so that the orthonormalisation has its share
                    call()

            return run

        contestants = {
            f"ours, every {every}": several(kept_graph(problem, k, every)),
            "ours, every step": several(kept_graph(problem, k, 1)),
            "ours, own loop": several(kept_graph(problem, k, every, reuse=True)),
            "JVP loop": several(forward_mode(problem, k, batched=False)),
            "vmapped JVP": several(forward_mode(problem, k, batched=True)),
            "perturbed runs": several(perturbed(problem, k, 1e-3)),
        }
        timing = interleave(
            contestants,
            {"step": several(problem.step)},
            rounds=arguments.rounds,
            threads=arguments.threads,
            repeats=1,
        )
        for name, time in timing.items():
            cost = per_exponent(time, k)
            results[f"k={k} / {name}"] = asdict(cost)
            rows.append([str(k), name, cost.text(), time.units["step"].text()])
    print_table(["k", "method", "steps per exponent [quartiles]", "whole step / plain step"], rows)
    check = accuracy(
        arguments.widths, arguments.batch, arguments.rate, max(arguments.ks), arguments.every, arguments.steps
    )
    results["accuracy"] = check
    print_table(["accuracy", "value"], [[name, f"{value:.3g}"] for name, value in check.items()])
    print("\nReach: ours <= 1.6 at k=1 and <= 2.0 at k=8.")
    report(arguments, results, load_before=before)
    return results


def per_exponent(time: Timing, k: int) -> Spread:
    """What following one tangent adds to a step, in plain steps."""
    unit = time.units["step"]
    return Spread(*((value - 1) / k for value in (unit.median, unit.lower, unit.upper)))


if __name__ == "__main__":
    main()
