"""Adam, optimistic Adam and complex Adam on the ring of eight Gaussians: equal updates, one grid of learning rates.

All seeds of a setting train at once: the networks of a seed are one slice of stacked weights, the loss is the sum over
seeds, and these optimizers act on every number alone, so that the seeds do not touch each other. With
``--tuning-seeds`` the rate of each method is chosen on seeds of their own, which are trained apart, with other data.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _network_games import StackedMLP
from _running import script_parser, silent_trainer
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from lightning_nested.datamodules import MixtureOfGaussiansDataModule
from lightning_nested.files import replace_text
from lightning_nested.games import high_quality, modes_covered
from lightning_nested.modules import GameLoop, GANModule
from lightning_nested.optim import ComplexAdam, OptimisticAdam
from lightning_nested.trainer.random_stream import RandomStream

METHODS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "Adam, β₁ = 0": lambda params, lr: torch.optim.Adam(params, lr=lr, betas=(0.0, 0.999)),
    "Adam, β₁ = 0.5": lambda params, lr: torch.optim.Adam(params, lr=lr, betas=(0.5, 0.999)),
    "OptimisticAdam, β₁ = 0.5": lambda params, lr: OptimisticAdam(params, lr=lr, betas=(0.5, 0.999)),
    "ComplexAdam, β₁ = 0.8 exp(iπ/8)": lambda params, lr: ComplexAdam(
        params, lr=lr, betas=(0.8, 0.999), phase=math.pi / 8
    ),
}


class StackedGAN(GANModule):
    """GAN for each seed; the loss is the sum over seeds, so each seed has its own gradient."""

    def __init__(self, seeds: Sequence[int], hidden: int, latent_dim: int, **options: Any) -> None:
        super().__init__(
            StackedMLP(seeds, [latent_dim, hidden, hidden, 2], 1),
            StackedMLP(seeds, [2, hidden, hidden, 1], 2),
            latent_dim=latent_dim,
            **options,
        )
        self.num_seeds = len(seeds)

    def player_loss(self, name: str, batch: Any) -> Tensor:
        """Return the sum over seeds."""
        return self.num_seeds * super().player_loss(name, batch)

    def real_data(self, batch: Any) -> tuple[Tensor, None]:
        """Return different points for every seed."""
        return batch[0].view(-1, self.num_seeds, 2), None

    def discriminate(self, data: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits (n, seeds)."""
        logits: Tensor = self.discriminator(data).squeeze(-1)
        return logits

    def sample_latents(self, count: int) -> Tensor:
        """Draw different latents for every seed."""
        return torch.randn(count, self.num_seeds, self.latent_dim)


class Snapshots(Callback):
    """Record modes and share of good samples of every seed, at each epoch's end."""

    def __init__(self, seeds: int) -> None:
        self.seeds = seeds
        self.found: dict[str, dict[str, list[float]]] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Count the modes and good samples of every seed."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with RandomStream(1):
            samples = pl_module.sample(2500)
        columns = [samples[:, s] for s in range(self.seeds)]
        self.found[str(pl_module.game_updates)] = {
            "modes": [modes_covered(x, data.centres, data.std, at_least=20) for x in columns],
            "quality": [float(high_quality(x, data.centres, data.std)) for x in columns],
        }


def run(method: str, rate: float, seeds: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """Train all seeds with one method and rate; return what each covers after every thousand updates."""
    seed_everything(min(seeds), verbose=False)
    module = StackedGAN(
        seeds,
        options.hidden,
        options.latent_dim,
        optimizer=lambda params: METHODS[method](params, rate),
        loop=GameLoop(reuse_batch=True),
    )
    snapshots = Snapshots(len(seeds))
    began = time.process_time()
    data = MixtureOfGaussiansDataModule(
        std=options.std, batch_size=options.batch_size * len(seeds), num_batches=min(1000, options.updates)
    )
    silent_trainer(snapshots, max_epochs=-1, max_steps=options.updates).fit(module, datamodule=data)
    return {"after": snapshots.found, "seconds": time.process_time() - began}


def table(results: dict[str, dict[str, dict[str, Any]]], seeds: int) -> str:
    """Return a table of every method at every rate; it marks the rate that the tuning seeds choose, if any."""
    moments = list(next(iter(next(iter(results.values())).values()))["after"])
    lines = [
        f"| method | rate | 8 of 8 modes after {' / '.join(moments)} updates | modes at the end | % high quality |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method, by_rate in results.items():
        chosen = max(
            by_rate, key=lambda rate: _score(by_rate[rate].get("tuning", by_rate[rate]), moments[-1])
        )
        for rate in sorted(by_rate, key=float):
            after = by_rate[rate]["after"]
            full = [sum(m == 8 for m in after[moment]["modes"]) for moment in moments]
            modes = _quartiles(after[moments[-1]]["modes"])
            quality = [100 * x for x in _quartiles(after[moments[-1]]["quality"])]
            name = f"**{float(rate):g}**" if rate == chosen else f"{float(rate):g}"
            if "tuning" in by_rate[rate]:
                covered, share = _score(by_rate[rate]["tuning"], moments[-1])
                name += f" ({covered}, {100 * share:.1f} %)"
            lines.append(
                f"| {method} | {name} | {' / '.join(map(str, full))} of {seeds} | "
                f"{modes[1]:g} [{modes[0]:g}, {modes[2]:g}] | "
                f"{quality[1]:.1f} [{quality[0]:.1f}, {quality[2]:.1f}] |"
            )
    return "\n".join(lines)


def crossed(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return a table of every method with the rate that the other half of the seeds chooses for each half."""
    lines = [
        "| method | rates chosen | 8 of 8 modes at the end | modes | % high quality |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method, by_rate in results.items():
        ends = {rate: list(found["after"].values())[-1] for rate, found in by_rate.items()}
        total = len(next(iter(ends.values()))["modes"])
        halves = [range(total // 2), range(total // 2, total)]
        modes, quality, rates = [], [], []
        for own, other in (halves, halves[::-1]):
            scores = {
                rate: _score(
                    {"after": {"end": {key: [end[key][i] for i in other] for key in ("modes", "quality")}}},
                    "end",
                )
                for rate, end in ends.items()
            }
            best = max(scores, key=lambda rate: scores[rate])
            rates.append(f"{float(best):g}")
            modes += [ends[best]["modes"][i] for i in own]
            quality += [100 * ends[best]["quality"][i] for i in own]
        low, middle, high = _quartiles(modes)
        worst, usual, good = _quartiles(quality)
        lines.append(
            f"| {method} | {', '.join(rates)} | {sum(m == 8 for m in modes)} of {total} | "
            f"{middle:g} [{low:g}, {high:g}] | {usual:.1f} [{worst:.1f}, {good:.1f}] |"
        )
    return "\n".join(lines)


def _score(found: dict[str, Any], moment: str) -> tuple[int, float]:
    """Return the number of seeds that cover everything, then their median share of good samples."""
    last = found["after"][moment]
    return sum(m == 8 for m in last["modes"]), _quartiles(last["quality"])[1]


def _quartiles(values: Sequence[float]) -> list[float]:
    t = torch.tensor([float(v) for v in values], dtype=torch.float64)
    return [float(x) for x in t.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))]


def main() -> None:
    """Run the grid and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tuning-seeds", type=int, default=0, help="more seeds, which choose the rate only")
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--latent-dim", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--std", type=float, default=0.05)
    parser.add_argument("--output", type=Path, help="JSON; settings that are in it already are not run again")
    options = parser.parse_args()
    done = options.output is not None and options.output.exists()
    results: dict[str, dict[str, Any]] = json.loads(options.output.read_text()) if done else {}
    reported, tuning = range(options.seeds), range(options.seeds, options.seeds + options.tuning_seeds)
    for rate in options.rates:
        for method in METHODS:
            found = results.setdefault(method, {}).setdefault(str(rate), {})
            if "after" not in found:
                found |= run(method, rate, reported, options)
            if tuning and "tuning" not in found:
                found["tuning"] = run(method, rate, tuning, options)
            if options.output is not None:
                replace_text(options.output, json.dumps(results, indent=1))
    print(table(results, options.seeds), crossed(results), sep="\n\n")


if __name__ == "__main__":
    main()
