"""A mixture of sources for a small language model of one of them: shares of each batch tuned within the fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from _pays_tasks import LSTM
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor
from torch.nn import functional

from lightning_nested import GroupWeights, HypergradientCallback, TextSourcesDataModule

SYMBOLS = 2000


class Language(LightningModule):
    """Next words by an LSTM; examples are weighted by their source if weights are tuned."""

    group_weights: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.network = LSTM(SYMBOLS)

    def losses(self, batch: Sequence[Tensor]) -> Tensor:
        """Return the mean loss of each row."""
        return functional.cross_entropy(self.network(batch[0]), batch[1], reduction="none").mean(1)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the weighted mean loss."""
        losses = self.losses(batch)
        if self.group_weights is not None:
            losses = losses * self.group_weights(batch[2])
        return losses.mean()

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss."""
        return self.losses(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=4e-3)

    @torch.no_grad()
    def perplexity(self, rows: Tensor) -> float:
        """Return the perplexity of rows of words."""
        self.eval()
        found = [self.losses((part[:, :-1], part[:, 1:])) for part in rows.split(100)]
        return float(torch.cat(found).mean().exp())


@dataclass
class Given:
    """Seed and length of a fit."""

    seed: int
    size: str

    def fit(self, mixture: Any) -> tuple[Language, TextSourcesDataModule, GroupWeights | None, float]:
        """Return the model, its data, its tuned weights and the CPU time of the fit."""
        smoke = self.size == "smoke"
        data = TextSourcesDataModule(
            ["pydoc", "library", "docstrings", "licenses"],
            "pydoc",
            mixture=mixture,
            target_tokens=15_000,
            train_tokens=3_000 if smoke else 60_000,
            max_characters=60_000 if smoke else 500_000,
            vocabulary_size=SYMBOLS,
            batch_size=32,
            val_batch_size=64,
            seed=self.seed,
        )
        data.setup()
        weights = GroupWeights(data.names) if mixture == "tuned" else None
        seed_everything(self.seed, verbose=False)
        module = Language()
        callbacks = [] if weights is None else [HypergradientCallback(weights)]
        before = time.process_time()
        plain_trainer(6 if smoke else 400, callbacks).fit(module, datamodule=data)
        return module, data, weights, time.process_time() - before


def arm(mixture: str) -> Callable[[Given], Numbers]:
    """Return the arm that draws sources in this way."""

    def run(given: Given) -> Numbers:
        module, data, weights, seconds = given.fit(mixture)
        share = {} if weights is None else {"share": float(weights.values()["pydoc"])}
        return {"perplexity": module.perplexity(data.test_rows), "seconds": seconds, **share}

    return run


MIXTURE = Experiment(
    question="Words of CPython's help topics from 15 000 of them and 60 000 words of each of three other sources: "
    "library code, docstrings, licenses; LSTM of 80 units, 400 steps of 32 rows in each arm",
    prepare=Given,
    arms={
        "proportional": arm("proportional"),
        "uniform": arm("uniform"),
        "tuned shares (GroupWeights)": arm("tuned"),
    },
    columns={
        "perplexity": Column(title="test perplexity", digits=1),
        "share": Column(title="final share of the target", digits=2),
    },
)
