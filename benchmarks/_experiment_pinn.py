"""Weights of the parts of a physics-informed loss, learned from a few sensors within one fit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from lightning_nested import HypergradientCallback, LossWeights, StepsDataModule
from lightning_nested.demos import HeatEquation
from lightning_nested.hyperparameters import Exp

PARTS = ("equation", "initial", "boundary")
STEPS, EPOCHS = 50, 40


class ByGradNorm(HeatEquation):
    """Weights that make the gradients of all parts equally large, larger for a part that lags behind.

    wᵢ moves so that wᵢ‖∇Lᵢ‖ approaches the mean over parts times (rᵢ)^α, with rᵢ the share of its first value that is
    left of Lᵢ over the mean share; weights are then scaled to their number. Gradients are those of the last layer.
    Chen, Badrinarayanan, Lee & Rabinovich (2018), ICML, PMLR 80:794-803; rate and α as there.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scores = torch.zeros(len(PARTS), requires_grad=True)
        self.balance = torch.optim.Adam([self.scores], lr=0.025)
        self.first: Tensor | None = None

    def weights(self) -> Tensor:
        """Return positive weights whose sum is their number."""
        return len(PARTS) * self.scores.softmax(0)

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum, after a step of the weights."""
        layer: Any = self.network[-1]
        losses = torch.stack([parts[name] for name in PARTS])
        sizes = torch.stack(
            [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in losses]
        )
        now = losses.detach()
        self.first = now if self.first is None else self.first
        left = now / self.first
        weighted = self.weights() * sizes.detach()
        aim = (weighted.mean() * (left / left.mean()) ** 1.5).detach()
        self.balance.zero_grad()
        (weighted - aim).abs().sum().backward()
        self.balance.step()
        return (self.weights().detach() * losses).sum()


class ByUPGrad(HeatEquation):
    """Weights that leave no part worse: each gradient projected onto those that disagree with none, and their mean.

    Quinton & Rey (2024), arXiv:2406.16232, by torchjd. The direction is a combination of the gradients, whose factors
    are the weights.
    """

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum."""
        from torchjd.aggregation import UPGradWeighting

        losses = [parts[name] for name in PARTS]
        weights = list(self.network.parameters())
        rows = [
            parameters_to_vector(
                torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
            )
            for loss in losses
        ]
        jacobian = torch.stack(rows)
        return UPGradWeighting()(jacobian @ jacobian.T).detach() @ torch.stack(losses)


class Fixed(nn.Module):
    """Weights that stay."""

    def __init__(self, values: Mapping[str, float]) -> None:
        super().__init__()
        self.values = values

    def forward(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum."""
        return torch.stack([self.values[name] * part for name, part in parts.items()]).sum()


@dataclass
class Given:
    """One seed: sensors, first weights of the network and random points."""

    seed: int
    epochs: int

    def module(self, kind: type[HeatEquation] = HeatEquation, **options: Any) -> Any:
        """Return the untrained module, in float64, with the same network for each arm."""
        seed_everything(self.seed, verbose=False)
        cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=self.epochs)
        return kind(scheduler=cosine, seed=self.seed, **options)

    def fit(self, module: HeatEquation, *callbacks: Callback) -> float:
        """Train, and return the CPU time of the fit."""
        trainer = plain_trainer(self.epochs * STEPS, callbacks, precision="64-true")
        before = time.process_time()
        trainer.fit(module, datamodule=StepsDataModule(steps=STEPS))
        return time.process_time() - before


def prepare(seed: int, size: str) -> Given:
    """Choose the length of the training."""
    return Given(seed, 1 if size == "smoke" else EPOCHS)


def numbers(module: HeatEquation, seconds: float, weights: Mapping[str, float] | None = None) -> Numbers:
    """Return the error, and the weights relative to that of the equation."""
    shares = {n: weights[n] / weights["equation"] for n in PARTS[1:]} if weights else {}
    return {"error": float(module.error()), "seconds": seconds, **shares}


def plain(given: Given, **options: Any) -> Numbers:
    """Train with equal weights."""
    module = given.module(**options)
    return numbers(module, given.fit(module))


def grad_norm(given: Given) -> Numbers:
    """Train with GradNorm."""
    module = given.module(ByGradNorm)
    seconds = given.fit(module)
    return numbers(module, seconds, dict(zip(PARTS, module.weights().tolist(), strict=True)))


def up_grad(given: Given) -> Numbers:
    """Train with UPGrad."""
    module = given.module(ByUPGrad)
    return numbers(module, given.fit(module))


def grid(factors: Sequence[float]) -> Callable[[Given], Numbers]:
    """Return the arm that tries factors of both conditions, and keeps the training with the lowest misfit."""

    def arm(given: Given) -> Numbers:
        total, best = 0.0, (math.inf, given.module(), {})
        for factor in factors if given.epochs > 1 else factors[:1]:
            module, values = given.module(), dict.fromkeys(PARTS, factor) | {"equation": 1.0}
            module.loss_weights = Fixed(values)
            total += given.fit(module)
            best = min(best, (float(module.misfit()), module, values), key=lambda found: found[0])
        return numbers(best[1], total, best[2])

    return arm


def learned(weights: Callable[[], LossWeights], **options: Any) -> Callable[[Given], Numbers]:
    """Return the arm whose weights the callback moves by the misfit at the sensors."""

    def arm(given: Given) -> Numbers:
        module, tuned = given.module(), weights()
        seconds = given.fit(module, HypergradientCallback(tuned, **options))
        return numbers(module, seconds, {name: float(value) for name, value in tuned.values().items()})

    return arm


def positive() -> LossWeights:
    """Return weights whose steps are factors."""
    return LossWeights(PARTS, transform=Exp(lower=1e-4, upper=1e4))


ARMS = {
    "equal weights": plain,
    "training on the sensors too": partial(plain, train_on_sensors=True),
    "GradNorm": grad_norm,
    "UPGrad": up_grad,
    "learned, the default": learned(lambda: LossWeights(PARTS)),
    "learned, steps are factors": learned(positive),
    "learned, steps are factors, 90 outer steps of 0.2": learned(
        positive, optimizer=partial(torch.optim.Adam, lr=0.2), every_n_steps=20
    ),
    "four trainings, conditions × 1, 10, 100, 1 000": grid((1.0, 10.0, 100.0, 1_000.0)),
}
if find_spec("torchjd") is None:
    del ARMS["UPGrad"]
PINN = Experiment(
    question="u_t = u_xx on 0 < x < 1, 0 < t < 0.1, MLP 2-20-20-1 (tanh, float64), 2 000 steps of Adam on a cosine; 20 "
    "sensors with noise of 0.02 at random places and times are the validation data",
    prepare=prepare,
    arms=ARMS,
    columns={
        "error": Column(title="relative L2 error", digits=4),
        "initial": Column(title="weight of the start / equation", digits=1),
        "boundary": Column(title="weight of the ends / equation", digits=1),
    },
)
