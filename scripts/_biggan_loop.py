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
    """Seconds of each round of a fit: first alone, then beside a plain loop; the fit stops when there are enough.

    Attributes:
        alone: Seconds of the rounds before the loop.
        beside: Seconds of a round and of the loop after it.
        memory: Peak of the device's memory in MiB before the loop is made; None on the CPU.
    """

    def __init__(self, make_loop: Callable[[], Callable[[], None]], rounds: int, warmup: int) -> None:
        self.make_loop, self.rounds, self.warmup = make_loop, rounds, warmup
        self.alone: list[float] = []
        self.beside: list[tuple[float, float]] = []
        self.memory: float | None = None
        self._loop: Callable[[], None] | None = None
        self._mark: float | None = None

    @property
    def batches(self) -> int:
        """Batches that the fit needs."""
        return D_STEPS * (2 * (self.rounds + self.warmup) + 2)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note a round that is over, between two rounds of the fit."""
        if batch_idx % D_STEPS:
            return
        now = self._now()
        if self._mark is not None:
            self._note(now)
            trainer.should_stop = len(self.beside) >= self.rounds + self.warmup
            gc.collect()
        self._mark = self._now()

    def _note(self, now: float) -> None:
        assert self._mark is not None
        if self._loop is not None:
            self._loop()
            self.beside.append((now - self._mark, self._now() - now))
            return
        self.alone.append(now - self._mark)
        if len(self.alone) >= self.rounds + self.warmup:
            if torch.cuda.is_available():
                self.memory = torch.cuda.max_memory_allocated() / 2**20
            self._loop = self.make_loop()

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def figures(self) -> tuple[float, float, float]:
        """Return medians after the warm-up: seconds alone, seconds of the loop, the Trainer's time over the loop's."""
        beside = self.beside[self.warmup :]
        ratio = statistics.median(ours / loop for ours, loop in beside)
        return statistics.median(self.alone[self.warmup :]), statistics.median(t for _, t in beside), ratio
