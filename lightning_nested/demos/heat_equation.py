"""A physics-informed network for the heat equation, whose loss has parts that nobody knows the weights of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_nested.arguments import at_least, check, positive
from lightning_nested.modules.optimizers import with_scheduler
from lightning_nested.trainer.lightning import built_by_command_line

# Amplitude at t = 0 of each wave number of the solution.
_WAVES = {1: 1.0, 2: 0.5}


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Adam of rate 0.01."""
    return torch.optim.Adam(parameters, lr=0.01)


class HeatEquation(LightningModule):
    """Solves u_t = D·u_xx on 0 < x < 1, 0 < t < T by a network u(x, t) that is trained on the equation itself.

    The training loss has three parts, each a mean square: ``equation``, the residual u_t − D·u_xx at random points;
    ``initial``, the distance from u(x, 0) = sin πx + ½ sin 2πx; ``boundary``, that from u = 0 at both ends. How they
    are weighed decides what the network learns: the residual is in other units. ``loss_weights``, if a callback puts
    :class:`LossWeights` there, weighs them; else they count equally. The validation loss is the misfit at a few
    sensors, whose measurements have noise. ``error``, the relative L2 distance from the exact solution, is logged with
    it, and in a test ``test_loss`` and ``test_error``. Batches are not read: use it with :class:`StepsDataModule`. In a
    data-parallel run each process has points of its own.
    Raissi, Perdikaris & Karniadakis (2019), Journal of Computational Physics 378:686-707.

    Args:
        width: Units of each of two hidden layers (tanh).
        points: Random points of a step at which the equation is to hold.
        diffusion: D.
        duration: T.
        sensors: Measurements, at random places and times.
        noise: Standard deviation of the measurements' noise.
        train_on_sensors: Whether the misfit at the sensors is a fourth part, ``sensors``, of the training loss.
        optimizer: From parameters to optimizer; default Adam of rate 0.01.
        scheduler: From optimizer to learning-rate scheduler, stepped after each epoch.
        seed: Seed of the sensors.

    Attributes:
        loss_weights: Weights of the parts; None: all 1.

    Raises:
        ValueError: A size is below 1, or not positive.

    Example:
        >>> module = HeatEquation(sensors=3)
        >>> sorted(module.parts())
        ['boundary', 'equation', 'initial']
    """

    where: Tensor
    when: Tensor
    measured: Tensor

    def __init__(
        self,
        width: int = 20,
        points: int = 100,
        *,
        diffusion: float = 1.0,
        duration: float = 0.1,
        sensors: int = 20,
        noise: float = 0.02,
        train_on_sensors: bool = False,
        optimizer: OptimizerCallable = default_optimizer,
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        check(HeatEquation.__init__, locals())
        super().__init__()
        at_least(1, width=width, points=points, sensors=sensors)
        at_least(0, noise=noise, seed=seed)
        positive(diffusion=diffusion, duration=duration)
        live = {"optimizer": optimizer, "scheduler": scheduler}
        plain = built_by_command_line()
        self.save_hyperparameters(ignore=[n for n, value in live.items() if callable(value) and not plain])
        self.points, self.diffusion, self.duration = points, diffusion, duration
        self.train_on_sensors, self._make = train_on_sensors, (optimizer, scheduler)
        self.loss_weights: Any = None
        self.network = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )
        generator = torch.Generator().manual_seed(seed)
        x, share, error = (
            draw(sensors, generator=generator, dtype=torch.float64)
            for draw in (torch.rand, torch.rand, torch.randn)
        )
        t = duration * share
        for name, value in {"where": x, "when": t, "measured": self.solution(x, t) + noise * error}.items():
            self.register_buffer(name, value.to(torch.get_default_dtype()))

    def solution(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the exact solution at places and times of equal shapes."""
        waves = [
            size * torch.exp(-self.diffusion * (k * math.pi) ** 2 * t) * torch.sin(k * math.pi * x)
            for k, size in _WAVES.items()
        ]
        return torch.stack(waves).sum(0)

    @override
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return u at places and times, all of shape (points,)."""
        inputs = torch.stack([2 * x - 1, 2 * t / self.duration - 1], -1)
        return self.network(inputs).squeeze(-1)  # type: ignore[no-any-return]

    def parts(self) -> dict[str, Tensor]:
        """Return the parts of the training loss at new random points."""
        kind: dict[str, Any] = {"dtype": self.where.dtype, "device": self.where.device}
        # Each process draws the points of all, which share a seed, and takes its own.
        processes, rank = _processes()
        x, share = torch.rand(processes, 2, self.points, **kind)[rank]
        x, t = x.requires_grad_(), (self.duration * share).requires_grad_()
        u = self(x, t)
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        along = torch.linspace(0, 1, 50, **kind)
        zero, ends = torch.zeros_like(along), torch.arange(50, **kind) % 2
        found = {
            "equation": (u_t - self.diffusion * u_xx).square().mean(),
            "initial": (self(along, zero) - self.solution(along, zero)).square().mean(),
            "boundary": self(ends, self.duration * along).square().mean(),
        }
        if self.train_on_sensors:
            found["sensors"] = self.misfit()
        return found

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the training loss."""
        if self.loss_weights is None:
            return torch.stack(list(parts.values())).sum()
        return self.loss_weights(parts)  # type: ignore[no-any-return]

    def misfit(self) -> Tensor:
        """Return the mean squared distance from what the sensors measured."""
        loss: Tensor = (self(self.where, self.when) - self.measured).square().mean()
        return loss

    @torch.no_grad()
    def error(self) -> Tensor:
        """Return ‖u − solution‖/‖solution‖ on a grid of 101 × 101 points."""
        x, share = (a.flatten() for a in torch.meshgrid(*2 * [torch.linspace(0, 1, 101)], indexing="ij"))
        x, t = x.to(self.where), self.duration * share.to(self.where)
        truth = self.solution(x, t)
        return (self(x, t) - truth).norm() / truth.norm()  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.combine(self.parts())
        self.log("train_loss", loss, batch_size=1)
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.misfit()
        found = {"val_loss": loss, "error": self.error()}
        self.log_dict(found, prog_bar=True, batch_size=1, sync_dist=True)
        return loss

    @override
    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.misfit()
        self.log_dict({"test_loss": loss, "test_error": self.error()}, batch_size=1, sync_dist=True)
        return loss

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, with the scheduler if there is one."""
        return with_scheduler(self, *self._make)


def _processes() -> tuple[int, int]:
    """Return how many processes train together, and which one this is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
