"""What outer steps hold in memory for a large GPT, as the line at the start of fit counts it, with several settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from _fits import plain_trainer, quiet
from _gpt import GPT, loaders
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_nested import Current, HypergradientCallback, LookAhead, Neumann, WeightDecay
from lightning_nested.trainer.outer_memory import outer_memory

SETTINGS: dict[str, dict[str, Any]] = {
    "the default": {},
    "LookAhead(max_size=512)": {"at": LookAhead(max_size=512)},
    "Neumann(num_terms=5)": {"solver": Neumann(num_terms=5)},
    "Neumann(num_terms=5), Current()": {"solver": Neumann(num_terms=5), "at": Current()},
}


class OneStep(Callback):
    """Reads what is held after the first step, and ends the fit there; the plan is that of the whole run."""

    def __init__(self, tuner: HypergradientCallback) -> None:
        self.tuner, self.held = tuner, dict[str, int]()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Read and stop."""
        self.held = outer_memory(self.tuner.plan, self.tuner.outer_loop.parameters)
        trainer.should_stop = True


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, int]]:
    """Print a row for each setting, and return the bytes by what they are of."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=14)
    options = parser.parse_args(arguments)
    quiet()
    found = {}
    for name, chosen in SETTINGS.items():
        module = GPT(width=options.width, depth=options.depth, context=16)
        tuner = HypergradientCallback(WeightDecay(), **chosen)
        train, val, _ = loaders(200, 1, 16, 700)
        step = OneStep(tuner)
        plain_trainer(100, [tuner, step]).fit(module, train, val)
        found[name] = step.held
        weights = sum(4 * p.numel() for p in module.parameters())
        total = sum(found[name].values())
        parts = ", ".join(
            f"{part} {size / 1e9:.2f}" for part, size in found[name].items() if size > 0.01 * total
        )
        print(f"| {name} | {weights / 1e9:.2f} | {total / 1e9:.2f} | {parts} |", flush=True)
    return found


if __name__ == "__main__":
    main()
