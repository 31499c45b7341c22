"""What the Trainer and complex momentum cost one game update of BigGAN, against a hand-written loop.

A callback stops the fit at the start of each round. The round that went by, Trainer included, is one measurement;
then the same update is made by plain loops on copies of the networks, once with Adam and once with ComplexAdam
for the discriminator. So all three are interleaved in one process.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import _measuring as measuring
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn import functional

from lightning_nested.datamodules import SyntheticImagesDataModule
from lightning_nested.modules import BigGAN, BigGANNetworks, Execution
from lightning_nested.optim import ComplexAdam

D_STEPS = 4


class Loop:
    """Plain PyTorch: 4 discriminator steps and a generator step, as a user would write them."""

    def __init__(self, gan: BigGAN, data: SyntheticImagesDataModule, discriminator: Any) -> None:
        self.generator, self.discriminator = copy.deepcopy(gan.generator), copy.deepcopy(gan.discriminator)
        self.latent_dim = gan.networks.latent_dim
        adam = partial(torch.optim.Adam, lr=2e-4, betas=(0.0, 0.999))
        self.optimizer_g, self.optimizer_d = (
            adam(self.generator.parameters()),
            discriminator(self.discriminator.parameters()),
        )
        self.batches = endless(data)

    def fakes(self, count: int) -> tuple[Tensor, Tensor]:
        """Images of random classes."""
        y = torch.randint(10, (count,))
        return self.generator(torch.randn(count, self.latent_dim), y), y

    def __call__(self) -> None:
        """One game update."""
        for _ in range(D_STEPS):
            images, labels = next(self.batches)
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                fakes, y = self.fakes(len(images))
            scores = self.discriminator(torch.cat((images, fakes)), torch.cat((labels, y)))
            real, fake = scores.split(len(images))
            loss = functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
            self.optimizer_d.zero_grad()
            loss.backward()
            self.optimizer_d.step()
        fakes, y = self.fakes(len(images))
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(False)
        self.optimizer_g.zero_grad()
        (-self.discriminator(fakes, y).mean()).backward()
        self.optimizer_g.step()
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(True)


def endless(data: SyntheticImagesDataModule) -> Iterator[Any]:
    """The training batches again and again."""
    while True:
        yield from data.train_dataloader()


class Interleave(Callback):
    """Times each round of the fit, and the loops between them."""

    def __init__(self, loops: dict[str, Loop], rounds: int, threads: int) -> None:
        self.loops, self.rounds = loops, rounds
        self.now = measuring.clock(threads)
        self.mark: float | None = None
        self.found: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Between two rounds of the fit."""
        if batch_idx % D_STEPS:
            return
        if self.mark is not None:
            taken = {"BigGAN in the Trainer": self.now() - self.mark}
            for name, loop in self.loops.items():
                start = self.now()
                loop()
                taken[name] = self.now() - start
            self.found.append(taken)
            trainer.should_stop = len(self.found) >= self.rounds + 2
            gc.collect()
        self.mark = self.now()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    options = measuring.parser(__doc__, rounds=15)
    options.add_argument("--width", type=int, default=8)
    options.add_argument("--batch", type=int, default=32)
    chosen = options.parse_args(arguments)
    measuring.start(chosen)
    load = measuring.load()
    warnings.filterwarnings("ignore", module="lightning")
    torch.manual_seed(0)
    sizes = BigGANNetworks(width=chosen.width, initialization="orthogonal")
    gan = BigGAN(sizes, execution=Execution(log_details=False))
    rows = (chosen.rounds + 4) * D_STEPS * chosen.batch
    data = SyntheticImagesDataModule(train_size=rows, val_size=0, batch_size=chosen.batch)
    data.setup()
    adam = partial(torch.optim.Adam, lr=2e-4, betas=(0.0, 0.999))
    loops = {
        "hand-written loop, Adam": Loop(gan, data, adam),
        "hand-written loop, ComplexAdam": Loop(gan, data, partial(ComplexAdam, lr=2e-4)),
    }
    callback = Interleave(loops, chosen.rounds, chosen.threads)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[callback],
    )  # fmt: skip
    gc.disable()
    try:
        trainer.fit(gan, data)
    finally:
        gc.enable()
    rounds = callback.found[2:]  # without the warm-up
    base = "hand-written loop, Adam"
    results = {
        name: {
            "milliseconds": measuring.Spread.of([1e3 * r[name] for r in rounds]),
            "ratio": measuring.Spread.of([r[name] / r[base] for r in rounds]),
        }
        for name in rounds[0]
    }
    rows_ = [[name, r["milliseconds"].text(0), r["ratio"].text(3)] for name, r in results.items()]
    measuring.print_table(["one update: 4 D steps and a G step", "ms", "to the loop with Adam"], rows_)
    measuring.report(chosen, results, load_before=load)
    return results


if __name__ == "__main__":
    main()
