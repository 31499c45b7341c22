"""BigGAN's update as a plain loop on the device, timed between the Trainer's."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional

from lightning_nested.modules import BigGAN

D_STEPS = 4


class PlainLoop:
    """4 discriminator steps and a generator step in bf16 and channels_last, as a user would write them."""

    def __init__(
        self, gan: BigGAN, data: Any, discriminator: Any, device: torch.device, *, compiled: bool
    ) -> None:
        self.device, self.latent_dim = device, gan.networks.latent_dim
        networks: list[Any] = [copy.deepcopy(n) for n in (gan.generator, gan.discriminator)]
        for network in networks:
            network.to(device, memory_format=torch.channels_last)
        self.parameters = list(networks[1].parameters())
        adam = partial(torch.optim.Adam, lr=2e-4, betas=(0.0, 0.999))
        self.optimizer_g, self.optimizer_d = adam(networks[0].parameters()), discriminator(self.parameters)
        calls: list[Any] = [torch.compile(n) for n in networks] if compiled else list(networks)
        self.generator, self.discriminator = calls
        self.batches = _endless(data)

    def fakes(self, count: int) -> tuple[Tensor, Tensor]:
        """Return images of random classes."""
        y = torch.randint(10, (count,), device=self.device)
        return self.generator(torch.randn(count, self.latent_dim, device=self.device), y), y

    def __call__(self) -> None:
        """Do one game update."""
        for _ in range(D_STEPS):
            images, labels = next(self.batches)
            images = images.to(self.device).contiguous(memory_format=torch.channels_last)
            labels = labels.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16):
                with torch.no_grad():
                    fakes, y = self.fakes(len(images))
                both = torch.cat((images, fakes.to(images.dtype)))
                scores = self.discriminator(both, torch.cat((labels, y))).float()
                real, fake = scores.split(len(images))
                loss = functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
            self.optimizer_d.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer_d.step()
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        self.optimizer_g.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16):
            fakes, y = self.fakes(len(images))
            loss = -self.discriminator(fakes.float(), y).float().mean()
        torch.autograd.backward(loss)
        self.optimizer_g.step()
        for parameter in self.parameters:
            parameter.requires_grad_(True)


def _endless(data: Any) -> Iterator[Any]:
    while True:
        yield from data.train_dataloader()


class Rounds(Callback):
    """Seconds of each round of a fit, and of the loop after it; the fit stops when there are enough."""

    def __init__(
        self, loop: Callable[[], None] | None, rounds: int, warmup: int, synchronize: Callable[[], None]
    ) -> None:
        self.loop, self.rounds, self.warmup, self.synchronize = loop, rounds, warmup, synchronize
        self.found: list[dict[str, float]] = []
        self._mark: float | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note a round that is over, between two rounds of the fit."""
        if batch_idx % D_STEPS:
            return
        now = self._now()
        if self._mark is not None:
            taken = {"trainer": now - self._mark}
            if self.loop is not None:
                self.loop()
                taken["loop"] = self._now() - now
            self.found.append(taken)
            trainer.should_stop = len(self.found) >= self.rounds + self.warmup
            gc.collect()
        self._mark = self._now()

    def _now(self) -> float:
        self.synchronize()
        return time.perf_counter()

    def median(self, name: str) -> float:
        """Return the median of the rounds after the warm-up, in seconds."""
        return statistics.median(taken[name] for taken in self.found[self.warmup :])

    def ratio(self) -> float:
        """Return the median of the Trainer's time over the loop's in the same round."""
        return statistics.median(taken["trainer"] / taken["loop"] for taken in self.found[self.warmup :])
