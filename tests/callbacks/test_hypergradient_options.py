"""Learning rates, momenta and betas of an unchanged module's optimizer, tuned by HypergradientCallback."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hyperparameters import Betas, LearningRate, Momentum
from lightning_nested.optim import ComplexAdam, ComplexSGD, OptimisticAdam, OptimisticSGD
from tests.callbacks.tuned_regression import Regression, data, sgd, smooth
from tests.trainers import trainer

STEPS = 7


class Given(Regression):
    """The regression with a given optimizer, and scheduler."""

    def __init__(self, make: Any, schedule: Any = None) -> None:
        super().__init__(smooth())
        self.make, self.schedule = make, schedule

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Shift(Callback):
    """Changes options of one group in the last steps of a run, as a tuned value would."""

    def __init__(self, change: Callable[[dict[str, Any]], dict[str, Any]], group: int, horizon: int) -> None:
        self.change, self.group, self.horizon = change, group, horizon

    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step < STEPS - self.horizon:
            return
        group = optimizer.param_groups[self.group]
        changed = self.change(group)
        own = {key: group[key] for key in changed}
        group.update(changed)
        handle = optimizer.register_step_post_hook(lambda *_: (group.update(own), handle.remove()))


def loaders(options: dict[str, Any]) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return batches for one step more than the run has, and validation data in one batch."""
    batches = (STEPS + 1) * options.get("accumulate_grad_batches", 1)
    return DataLoader(data(4 * batches, 1), batch_size=4), DataLoader(VALIDATION, batch_size=9)


VALIDATION = data(9, 2)


def final_loss(make: Any, schedule: Any, options: dict[str, Any], *callbacks: Callback) -> float:
    """Return the outer loss after a plain run."""
    module = Given(make, schedule)
    trainer(*callbacks, max_steps=STEPS, **options).fit(module, *loaders(options))
    with torch.no_grad():
        x, y = VALIDATION.tensors
        return float(0.5 * ((module.net(x) - y) ** 2).mean())


def found(make: Any, option: Any, schedule: Any = None, others: tuple[Any, ...] = (), **options: Any) -> Tensor:
    """Return the hypergradient of the option at step 7, by the unconstrained tensor."""
    callback = HypergradientCallback(
        [option, *others], optimizer=sgd(1.0), every_n_steps=10**6, warmup_steps=STEPS, self_check=False
    )
    module = Given(make, schedule)
    before = {}

    class Read(Callback):
        def on_train_start(self, *_: Any) -> None:
            (before["raw"],) = (t.detach().clone() for t in option.tensors.values())

    trainer(callback, Read(), max_steps=STEPS + 1, **options).fit(module, *loaders(options))
    assert callback.outer_steps == 1
    (raw,) = option.tensors.values()
    return before["raw"] - raw.detach()


def log_rate(epsilon: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda group: {"lr": group["lr"] * math.exp(epsilon)}


def logit(value: float, epsilon: float) -> float:
    return 1 / (1 + math.exp(-(math.log(value / (1 - value)) + epsilon)))


RATES: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.03, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1),
    "complex_sgd": lambda p: ComplexSGD(p, lr=0.1),
    "complex_adam": lambda p: ComplexAdam(p, lr=0.03),
    "optimistic_sgd": lambda p: OptimisticSGD(p, lr=0.1),
    "optimistic_adam": lambda p: OptimisticAdam(p, lr=0.03),
}


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("name", RATES)
def test_rates_are_those_of_runs_with_other_rates(name: str, horizon: int) -> None:
    make, epsilon = RATES[name], 1e-4
    gradient = found(make, LearningRate(horizon=horizon))
    ends = [
        final_loss(make, None, {}, Shift(log_rate(e), 0, horizon)) for e in (epsilon, -epsilon)
    ]
    # Central differences of a smooth function: of order ε², and rounding/ε.
    assert gradient.tolist() == pytest.approx([(ends[0] - ends[1]) / (2 * epsilon)], rel=1e-6)
