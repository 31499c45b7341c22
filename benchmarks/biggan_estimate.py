"""Operations, memory and days of a full BigGAN run on CIFAR-10, from what one game update does.

Operations are counted by torch's flop counter on the real networks at the real batch; memory is the exact peak of
live tensors in one update in float32. Time is operations over a rate that is assumed, not measured: a GPU's
dense peak times the share of it that such small convolutions reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import _measuring as measuring
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_nested.modules import BigGAN, BigGANNetworks, Execution

UPDATES = 125_000
D_STEPS = 4


def update(gan: BigGAN, optimizers: dict[str, torch.optim.Optimizer], batch: Any) -> None:
    """One round of BigGAN without a Trainer."""
    for name in ("discriminator",) * D_STEPS + ("generator",):
        parameters = list(gan.players()[name].parameters())
        gradients = torch.autograd.grad(gan.player_loss(name, batch), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizers[name].step()
        optimizers[name].zero_grad()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Count, print and write."""
    options = measuring.parser(__doc__, rounds=1)
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--batch", type=int, default=50)
    options.add_argument("--teraflops", type=float, default=156.0, help="assumed peak (A100, TF32)")
    options.add_argument(
        "--share", type=float, default=0.15, help="assumed share of the peak that is reached"
    )
    options.add_argument("--no-memory", action="store_true", help="count operations only")
    chosen = options.parse_args(arguments)
    measuring.start(chosen)
    load = measuring.load()
    torch.manual_seed(0)
    gan = BigGAN(BigGANNetworks(width=chosen.width), execution=Execution(log_details=False))
    batch = torch.rand(chosen.batch, 3, 32, 32) * 2 - 1, torch.randint(10, (chosen.batch,))
    adam = partial(torch.optim.Adam, lr=2e-4, betas=(0.0, 0.999))
    optimizers = {name: adam(module.parameters()) for name, module in gan.players().items()}
    counter = FlopCounterMode(display=False)
    with counter:
        update(gan, optimizers, batch)
    operations = counter.get_total_flops()
    # Weights, one gradient of the larger player, two moments, and an average of the generator.
    parameters = sum(p.numel() for p in gan.parameters())
    results = {
        "parameters": parameters,
        "flop_per_update": operations,
        "flop_of_the_run": operations * UPDATES,
        "assumed_flop_per_second": chosen.teraflops * 1e12 * chosen.share,
        "hours_at_that_rate": operations * UPDATES / (chosen.teraflops * 1e12 * chosen.share) / 3600,
        "bytes_of_states": 4 * (3 * parameters + sum(p.numel() for p in gan.generator.parameters())),
    }
    if not chosen.no_memory:
        results["peak_bytes_of_an_update"] = measuring.live_memory(partial(update, gan, optimizers, batch))
    measuring.print_table(["", ""], [[name, f"{value:.4g}"] for name, value in results.items()])
    measuring.report(chosen, results, load_before=load)
    return results


if __name__ == "__main__":
    main()
