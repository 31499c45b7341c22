"""Tune the learning rates and a decay per tensor of a digits classifier by differentiating through its training.

The training steps are the unrolled ones, so the validation gradient costs about one more pass back through them.
It starts from a rate far too small: 80 % of the test images right if kept, 93 % if tuned on the way.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.datamodules import DigitsDataModule
from lightning_nested.hyperparameters import LearningRate, WeightDecay
from lightning_nested.modules import NestedModule, Unrolled


class TunedDigits(NestedModule):
    """Network of two layers; only the two losses must be written."""

    def __init__(self, num_steps: int, rate: float, tune: bool) -> None:
        super().__init__(
            [LearningRate(), WeightDecay(per="tensor", init=1e-4, include=["*"])],
            gradient=Unrolled(num_steps=num_steps),
            inner_optimizer=lambda params: torch.optim.SGD(params, lr=rate, momentum=0.9),
            outer_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.2 if tune else 0.0),
        )
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))

    def inner_loss(self, batch: Any) -> Tensor:
        """Return the cross-entropy of a training batch."""
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def outer_loss(self, batch: Any) -> Tensor:
        """Return the cross-entropy of a validation batch."""
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the accuracy, for the closing table."""
        right = (self.net(batch[0]).argmax(dim=1) == batch[1]).float().mean()
        self.log("test_accuracy", right, batch_size=len(batch[1]))


def main() -> None:
    """Train once with fixed and once with tuned hyperparameters, from the same weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--num-steps", type=int, default=7, help="training steps per outer step")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate to start from")
    options = parser.parse_args()
    print(f"{'':10} {'accuracy':>9} {'learning rate':>14}")
    for tune in (False, True):
        seed_everything(0, verbose=False)
        module = TunedDigits(options.num_steps, options.rate, tune)
        trainer = Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = DigitsDataModule()
        trainer.fit(module, datamodule=data)
        (result,) = trainer.test(module, datamodule=data, verbose=False)
        rate = float(module.values()["learning_rate"])
        print(f"{'tuned' if tune else 'untuned':10} {result['test_accuracy']:9.3f} {rate:14.4g}")


if __name__ == "__main__":
    main()
