"""NaN and ∞ at random, in losses, gradients and second derivatives: the step is skipped, and nothing else happens."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nested.hypergradient import (
    ConjugateGradient,
    Curvature,
    DenseSolve,
    FiniteDifference,
    GaussNewton,
    Hessian,
    Identity,
    InverseSolver,
    Neumann,
    Nystrom,
)
from lightning_nested.modules import Implicit, LoopOptions, NestedModule
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.tuned_regression import Regression, data, sgd, unit
from tests.trainers import trainer

SOLVERS = [
    Identity(),
    Neumann(num_terms=3),
    Neumann(num_terms=3, step_size=0.1),
    ConjugateGradient(max_iterations=4, damping=10.0),
    Nystrom(rank=3, damping=0.5),
    DenseSolve(damping=1.0),
]
STEPS = 32


class Kink(torch.autograd.Function):
    """Zero, with a gradient of zero whose derivative is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sum() * 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        bent: Tensor = Bent.apply(x)
        return grad * bent


class Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * math.nan


class Weather:
    """Strikes some steps, at one place each."""

    places = ("loss", "outer loss", "outer gradient", "curvature")

    def __init__(self, seed: int) -> None:
        self.draws, self.struck, self.next = random.Random(seed), "", itertools.cycle(self.places)

    def change(self) -> None:
        self.struck = next(self.next) if self.draws.random() < 0.5 else ""

    def inner(self, loss: Tensor, weight: Tensor) -> Tensor:
        if self.struck == "loss":
            return loss * self.draws.choice((math.nan, math.inf, -math.inf))
        if self.struck == "curvature":
            loss = loss + Kink.apply(weight)
        return loss

    def outer(self, loss: Tensor) -> Tensor:
        if self.struck == "outer loss":
            return loss * self.draws.choice((math.nan, math.inf, -math.inf))
        return loss + (loss * 0).sqrt() if self.struck == "outer gradient" else loss


class Tuned(Regression):
    def __init__(self, weather: Weather) -> None:
        super().__init__(unit())
        self.weather = weather

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weather.inner(super().training_step(batch, batch_idx), self.net[0].weight)  # type: ignore[index]

    def outer_loss(self, batch: Any) -> Tensor:
        return self.weather.outer(0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        # As a user guards a training that has such losses: what is not finite moves nothing.
        for p in self.parameters():
            if p.grad is not None:
                p.grad.nan_to_num_(0.0, 0.0, 0.0)


class Nested(NestedModule):
    def __init__(self, weather: Weather, solver: InverseSolver) -> None:
        super().__init__(
            decay_all("parameter", init=1e-2), gradient=Implicit(solver=solver),
            inner_optimizer=sgd(0.05), loop=LoopOptions(max_skipped=STEPS),
        )  # fmt: skip
        self.net, self.weather = unit(), weather

    def inner_loss(self, batch: Any) -> Tensor:
        # A loss that is not finite moves the weights of this module, so it comes to the outer step alone.
        return 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return self.weather.outer(0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean())


class Watch(Callback):
    """Changes the weather before each step, and sees that skipped steps, and no others, leave the values alone."""

    def __init__(self, weather: Weather, tuned: Any) -> None:
        self.weather, self.tuned, self.struck = weather, tuned, list[str]()

    def on_train_batch_start(self, *_: Any) -> None:
        self.weather.change()
        outer = self.tuned.outer
        self.before = [t.detach().clone() for t in outer.tensors], self.tuned.skipped_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        tensors, skipped = self.before
        still = all(torch.equal(a, b) for a, b in zip(tensors, self.tuned.outer.tensors, strict=True))
        assert still == (self.tuned.skipped_steps == skipped + 1)
        if still:
            self.struck.append(self.weather.struck)
        for t in (*pl_module.parameters(), *self.tuned.outer.tensors):
            assert t.isfinite().all()


@pytest.mark.filterwarnings("ignore:(?s).*skipped")
@pytest.mark.parametrize(
    "curvature", [Hessian(), GaussNewton(outputs="net"), FiniteDifference()], ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_storm_skips_the_steps_it_strikes(solver: InverseSolver, curvature: Curvature) -> None:
    weather = Weather(seed=0)
    callback = exact(decay_all("parameter", init=1e-2), solver=solver, curvature=curvature, max_skipped=STEPS)
    watch = Watch(weather, callback)
    loaders = DataLoader(data(4 * STEPS, 1), 4), DataLoader(data(12, 2), 4)
    trainer(callback, watch, limit_val_batches=1).fit(Tuned(weather), *loaders)
    assert callback.inner_steps == callback.outer_steps + callback.skipped_steps == STEPS
    assert len(watch.struck) == callback.skipped_steps
    # Differences see no second derivative, Gauss-Newton none behind the outputs; no products see no inner loss.
    seen = {"outer loss", "outer gradient"}
    if not isinstance(solver, Identity):
        seen |= {"loss", "curvature"} if isinstance(curvature, Hessian) else {"loss"}
    assert set(watch.struck) == seen


@pytest.mark.filterwarnings("ignore:(?s).*skipped")
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_storm_over_a_nested_module(solver: InverseSolver) -> None:
    weather = Weather(seed=0)
    module = Nested(weather, solver)
    watch = Watch(weather, module)
    loaders = DataLoader(data(4 * STEPS, 1), 4), DataLoader(data(12, 2), 4)
    trainer(watch, limit_val_batches=0).fit(module, *loaders)
    assert module.outer_steps + module.skipped_steps == STEPS
    assert {"outer loss", "outer gradient"} == set(watch.struck)
