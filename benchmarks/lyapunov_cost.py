"""What an exponent of a running training costs, as a multiple of one plain SGD step.

The unit is one forward, backward and ``SGD.step()``. A contestant is the same step with k tangents followed; its cost
per exponent is (time − unit) / (k · unit). "Ours" does what ``LyapunovCallback`` does: the gradient that products come
from is handed to the run in place of its backward pass; "beside" keeps both; "in a Trainer" is the callback itself,
a whole ``fit`` with it against one without. "Frame handling" is what is no product: the tangents' steps and
orthonormalisation, as a share of all that following adds. Peers: a loop of forward-mode products (``torch.func.jvp``
of the gradient), the same products under ``vmap``, and k perturbed copies of the run, whose growth is a finite
difference. The float64 growth of the same tangents over the same step is the reference of the error.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from _measuring import Spread, Timing, clock, interleave, load, parser, print_table, report, start
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_nested.callbacks import LyapunovCallback
from lightning_nested.dynamics import TrainingTracker
from lightning_nested.dynamics.frames import orthonormalize
from lightning_nested.linalg.vectors import flatten, unflatten


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


def kept_graph(problem: Problem, k: int, every: int, *, beside: bool = False) -> Callable[[], object]:
    """Ours: all products from the kept graph of one gradient, which the parameters are given as well.

    Args:
        problem: What is trained.
        k: Exponents.
        every: Steps between orthonormalisations.
        beside: Make a backward pass of the run's own beside it.
    """
    tracker = TrainingTracker(problem.params, k=k, align=0, orthonormalize_every=every)

    def call() -> None:
        problem.optimizer.zero_grad()
        loss = problem.loss()
        tracker.observe(loss, lr=problem.rate)
        if beside:
            loss.backward()
        else:
            torch.autograd.backward(problem.params, tracker.gradient)
        tracker.advance(problem.optimizer)
        problem.optimizer.step()

    return call


def frame_handling(problem: Problem, k: int, every: int) -> Callable[[], object]:
    """What ours does besides products: push the frame, and orthonormalise it every few steps."""
    tracker = TrainingTracker(problem.params, k=k, align=0, orthonormalize_every=every)
    tracker.frame, products = random_rows(problem, k), random_rows(problem, k)
    for p in problem.params:
        p.grad = torch.zeros_like(p)

    def call() -> None:
        tracker.push(problem.optimizer, products)
        tracker.end_step()

    return call


class Batches(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The problem's batch, over and over."""

    def __init__(self, problem: Problem, count: int) -> None:
        self.pair, self.count = (problem.x, problem.y), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pair


def in_a_trainer(problem: Problem, k: int | None, every: int, steps: int) -> Callable[[], object]:
    """A ``fit`` of so many steps, with the callback for k exponents, or without one."""
    module = Training(problem)

    def call() -> None:
        callbacks = [] if k is None else [LyapunovCallback(k, align=0, orthonormalize_every=every)]
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(Batches(problem, steps), batch_size=None))

    return call


class Training(LightningModule):
    """The problem as an unmodified module."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.net, self.rate = problem.net, problem.rate

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of the batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.rate)


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
    options.add_argument("--only", nargs="+", default=[], help="contestants whose names begin so")
    options.add_argument("--trainer_steps", type=int, default=100, help="of a fit with the callback; 0: none")
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
            "ours, a backward pass beside": several(kept_graph(problem, k, every, beside=True)),
            "frame handling": several(frame_handling(problem, k, every)),
            "JVP loop": several(forward_mode(problem, k, batched=False)),
            "vmapped JVP": several(forward_mode(problem, k, batched=True)),
            "perturbed runs": several(perturbed(problem, k, 1e-3)),
        }
        if arguments.only:
            contestants = {n: c for n, c in contestants.items() if n.startswith((*arguments.only, "frame"))}
        timing = interleave(
            contestants,
            {"step": several(problem.step)},
            rounds=arguments.rounds,
            threads=arguments.threads,
            repeats=1,
        )
        handling = timing.pop("frame handling").units["step"]
        for name, time in timing.items():
            cost = per_exponent(time, k)
            results[f"k={k} / {name}"] = asdict(cost)
            rows.append([str(k), name, cost.text(), time.units["step"].text()])
        if f"ours, every {every}" in timing:
            share = handling.median / (timing[f"ours, every {every}"].units["step"].median - 1)
            results[f"k={k} / share of frame handling"] = share
            rows.append([str(k), "share of frame handling", f"{share:.1%}", handling.text()])
        if arguments.trainer_steps:
            cost, whole = trainer_cost(arguments, problem, k)
            results[f"k={k} / LyapunovCallback in a Trainer"] = asdict(cost)
            rows.append([str(k), "LyapunovCallback in a Trainer", cost.text(), whole.text()])
    print_table(["k", "method", "steps per exponent [quartiles]", "whole step / plain step"], rows)
    check = accuracy(
        arguments.widths, arguments.batch, arguments.rate, max(arguments.ks), arguments.every, arguments.steps
    )
    results["accuracy"] = check
    print_table(["accuracy", "value"], [[name, f"{value:.3g}"] for name, value in check.items()])
    print("\nReach: ours <= 1.6 at k=1 and <= 2.0 at k=8.")
    report(arguments, results, load_before=before)
    return results


def trainer_cost(arguments: argparse.Namespace, problem: Problem, k: int) -> tuple[Spread, Spread]:
    """What the callback adds to a fit, in plain steps per exponent, and the fit itself in fits without it."""
    steps, now = arguments.trainer_steps, clock(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Using default `ModelCheckpoint`.*")

    def elapsed(call: Callable[[], object]) -> float:
        start = now()
        call()
        return now() - start

    plain, followed = (in_a_trainer(problem, each, arguments.every, steps) for each in (None, k))
    costs, wholes = [], []
    for sample in range(arguments.rounds + 1):
        unit = elapsed(lambda: [problem.step() for _ in range(steps)])
        without, with_it = elapsed(plain), elapsed(followed)
        if sample:  # the first one warms up
            costs.append((with_it - without) / (k * unit))
            wholes.append(with_it / without)
    return Spread.of(costs), Spread.of(wholes)


def per_exponent(time: Timing, k: int) -> Spread:
    """What following one tangent adds to a step, in plain steps."""
    unit = time.units["step"]
    return Spread(*((value - 1) / k for value in (unit.median, unit.lower, unit.upper)))


if __name__ == "__main__":
    main()
