"""Weights of the terms of a physics-informed network, learned from a few sensors within one fit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested import HypergradientCallback, LossWeights
from lightning_nested.hyperparameters import Exp

# u_t = D·u_xx on 0 < x < 1, 0 < t < T, zero at both ends; the solution is a sum of decaying sines.
DIFFUSION, END = 1.0, 0.1
MODES = {1: 1.0, 2: 0.5}  # amplitude at t = 0 by wave number
TERMS = ("equation", "initial", "boundary")
SENSORS, NOISE = 20, 0.02
Points = tuple[Tensor, Tensor]


def solution(x: Tensor, t: Tensor) -> Tensor:
    """Return the temperature at places and times."""
    waves = [
        size * torch.exp(-DIFFUSION * (k * math.pi) ** 2 * t) * torch.sin(k * math.pi * x)
        for k, size in MODES.items()
    ]
    return torch.stack(waves).sum(0)


class Heat(LightningModule):
    """An MLP from place and time to temperature."""

    loss_weights: LossWeights | None = None
    sensors: tuple[Tensor, Tensor, Tensor] | None = None  # measurements to train on

    def __init__(self, steps: int, width: int = 20) -> None:
        super().__init__()
        self.steps = steps
        self.network = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        ).double()
        self.balance: Callable[[Mapping[str, Tensor]], Tensor] | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the temperature, shape (points,)."""
        out: Tensor = self.network(torch.stack([2 * x - 1, 2 * t / END - 1], -1)).squeeze(-1)
        return out

    def terms(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Return the mean squares of the equation's residual, and of the conditions at the start and at the ends."""
        x, t = x.requires_grad_(), t.requires_grad_()
        u = self(x, t)
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        along = torch.linspace(0, 1, 50, dtype=x.dtype)
        end = (torch.arange(50) % 2).to(x.dtype)
        start = self(along, torch.zeros_like(along)) - solution(along, torch.zeros_like(along))
        return {
            "equation": (u_t - DIFFUSION * u_xx).square().mean(),
            "initial": start.square().mean(),
            "boundary": self(end, END * along).square().mean(),
        }

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the weighted sum of the terms."""
        terms = self.terms(*(part.clone() for part in batch))
        if self.sensors is not None:
            terms["sensors"] = self.misfit(self.sensors)
        if self.balance is not None:
            return self.balance(terms)
        return torch.stack(list(terms.values())).sum() if self.loss_weights is None else self.loss_weights(terms)

    def misfit(self, sensors: Any) -> Tensor:
        """Return the mean squared distance from measurements."""
        x, t, u = sensors
        loss: Tensor = (self(x, t) - u).square().mean()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the misfit at the sensors."""
        return self.misfit(batch)

    def configure_optimizers(self) -> Any:
        """Return Adam with a rate that ends at zero on a cosine."""
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    @torch.no_grad()
    def error(self) -> float:
        """Return the relative L2 distance from the solution on a grid."""
        axes = (torch.linspace(0, 1, 101), torch.linspace(0, END, 101))
        x, t = (axis.flatten() for axis in torch.meshgrid(*(a.double() for a in axes), indexing="ij"))
        truth = solution(x, t)
        return float((self(x, t) - truth).norm() / truth.norm())


class GradNorm:
    """Weights that make the gradients of all terms equally large, larger for a term that lags behind.

    wᵢ moves so that wᵢ‖∇Lᵢ‖ approaches the mean over terms times (rᵢ)^α, with rᵢ the share of its first value that is
    left of Lᵢ over the mean share; the weights are then scaled to their number. The gradients are those of the last
    layer. Chen, Badrinarayanan, Lee & Rabinovich (2018), ICML, PMLR 80:794-803.
    """

    def __init__(self, layer: nn.Linear, rate: float = 0.025, power: float = 1.5) -> None:
        self.layer, self.power = layer, power
        self.logs = torch.zeros(len(TERMS), dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logs], lr=rate)
        self.first: Tensor | None = None

    def weights(self) -> Tensor:
        """Return positive weights whose sum is their number."""
        return len(TERMS) * self.logs.softmax(0)

    def __call__(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum, after a step of the weights."""
        losses = torch.stack([terms[name] for name in TERMS])
        norms = torch.stack(
            [torch.autograd.grad(loss, self.layer.weight, retain_graph=True)[0].norm() for loss in losses]
        )
        now = losses.detach()
        self.first = now if self.first is None else self.first
        left = now / self.first
        sizes = self.weights() * norms.detach()
        aim = (sizes.mean() * (left / left.mean()) ** self.power).detach()
        self.optimizer.zero_grad()
        (sizes - aim).abs().sum().backward()
        self.optimizer.step()
        return (self.weights().detach() * losses).sum()


@dataclass
class Given:
    """Sensors and places of one seed."""

    places: Points
    sensors: tuple[Tensor, Tensor, Tensor]
    seed: int
    steps: int

    def module(self) -> Heat:
        """Return the untrained module, the same for each arm."""
        seed_everything(self.seed, verbose=False)
        return Heat(self.steps)

    def fit(self, module: Heat, *callbacks: Callback) -> float:
        """Train, and return the CPU time of the fit."""
        train = DataLoader(TensorDataset(*self.places), batch_size=100, shuffle=True)
        val = DataLoader(TensorDataset(*self.sensors), batch_size=SENSORS)
        before = time.process_time()
        plain_trainer(self.steps, callbacks).fit(module, train, val)
        return time.process_time() - before


def prepare(seed: int, size: str) -> Given:
    """Draw places and sensors."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(count: int) -> Points:
        x, t = torch.rand(2, count, generator=generator, dtype=torch.float64)
        return x, END * t

    x, t = uniform(SENSORS)
    noise = NOISE * torch.randn(SENSORS, generator=generator, dtype=torch.float64)
    return Given(uniform(2_000), (x, t, solution(x, t) + noise), seed, 8 if size == "smoke" else 2_000)


def plain(given: Given) -> Numbers:
    """Train with equal weights."""
    module = given.module()
    seconds = given.fit(module)
    return {"error": module.error(), "seconds": seconds}


def with_sensors(given: Given) -> Numbers:
    """Train on the sensors too, with the same weight."""
    module = given.module()
    module.sensors = given.sensors
    seconds = given.fit(module)
    return {"error": module.error(), "seconds": seconds}


def by_size(given: Given) -> Numbers:
    """Train with GradNorm."""
    module = given.module()
    module.balance = balance = GradNorm(module.network[-1])  # type: ignore[arg-type]
    seconds = given.fit(module)
    weights = balance.weights().detach()
    return {
        "error": module.error(),
        "seconds": seconds,
        **{name: float(w / weights[0]) for name, w in zip(TERMS, weights, strict=True) if name != "equation"},
    }


def tuned(make: Callable[[], LossWeights], **options: Any) -> Callable[[Given], Numbers]:
    """Return the arm whose weights the callback moves by the misfit at the sensors."""

    def arm(given: Given) -> Numbers:
        module, weights = given.module(), make()
        seconds = given.fit(module, HypergradientCallback(weights, **options))
        value = weights.values()
        shares = {name: float(w / value["equation"]) for name, w in value.items() if name != "equation"}
        return {"error": module.error(), "seconds": seconds, **shares}

    return arm
