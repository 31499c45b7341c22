"""A mixture of sources for a small language model of another text: shares of each batch tuned within the fit."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from _language_scores import mean_loss
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import RandomSampler

from lightning_nested import GroupWeights, HypergradientCallback, LanguageModel, TextSourcesDataModule

WORDS, WIDTH, RATE, BATCH, EPOCHS = 1000, 80, 1e-2, 32, 10
TARGET = "pydoc"
SOURCES = ("docstrings", "reference", "library", "licenses", "fortunes", "bible")


class OnlineDataMixing(Callback):
    """The bandit Exp3, whose reward of a source is the training loss there (Albalak et al. 2023, arXiv 2312.02406).

    p = (1 − K·ε_t)·softmax(ε_{t−1}·R) + ε_t with ε_t = min(1/K, √(ln K/(K·t))) and R a running mean of rewards divided
    by the chance that they had.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.weights = GroupWeights(names)
        self.weights.build({})
        # Where the datamodule looks for the weights that draw its batches.
        self.outer = type("Outer", (), {"hyperparameters": [self.weights]})()
        self.rewards = torch.zeros(len(names))
        self.logits = torch.empty(0)
        self.steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what the network returns."""
        pl_module.network.register_forward_hook(self.keep)

    def keep(self, network: Any, inputs: Any, output: Any) -> None:
        """Keep the logits of a batch."""
        self.logits = output.logits.detach()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the losses of the batch's rows as rewards of their sources."""
        self.steps += 1
        count = len(self.rewards)
        p = self.weights.transform.forward(self.weights.tensors["weights"].detach())
        losses = functional.cross_entropy(self.logits.transpose(1, 2), batch[1], reduction="none").mean(1)
        for k in batch[2].unique().tolist():
            reward = float(losses[batch[2] == k].mean() / p[k])
            self.rewards[k] = 0.9 * self.rewards[k] + 0.1 * reward
        last, now = (
            min(1 / count, math.sqrt(math.log(count) / (count * t))) for t in (self.steps, self.steps + 1)
        )
        p = (1 - count * now) * (last * self.rewards).softmax(0) + now
        with torch.no_grad():
            self.weights.tensors["weights"].copy_(p.log())


@dataclass
class Given:
    """Text of a seed, read once."""

    text: TextSourcesDataModule
    seed: int

    def data(self, mixture: Any) -> TextSourcesDataModule:
        """Return the text in this mixture."""
        data = copy.copy(self.text)
        data.mixture = mixture
        return data

    def fit(self, data: TextSourcesDataModule, *callbacks: Callback) -> Numbers:
        """Return the test perplexity on the target, and the CPU time of the fit."""
        seed_everything(self.seed, verbose=False)
        module = LanguageModel(
            "lstm",
            vocabulary_size=WORDS,
            network_options={"width": WIDTH},
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=RATE),
            scheduler=lambda optimizer: CosineAnnealingLR(optimizer, EPOCHS),
        )
        steps = EPOCHS * data.epoch_rows // BATCH
        before = time.process_time()
        plain_trainer(steps, callbacks, gradient_clip_val=0.5).fit(module, datamodule=data)
        seconds = time.process_time() - before
        return {"perplexity": math.exp(mean_loss(module, data.test_rows)), "seconds": seconds}


def prepare(seed: int, size: str) -> Given:
    """Return the sources that are on this machine, and held-out text of the target."""
    smoke = size == "smoke"
    data = TextSourcesDataModule(
        [*SOURCES, TARGET],
        TARGET,
        target_tokens=0,
        max_characters=60_000 if smoke else 600_000,
        vocabulary_size=WORDS,
        length=20,
        batch_size=BATCH,
        val_batch_size=128,
        epoch_rows=(2 if smoke else 40) * BATCH,
        val_fraction=0.01 if smoke else 0.1,
        test_fraction=0.01 if smoke else 0.1,
        seed=seed,
    )
    data.setup()
    return Given(data, seed)


def given_shares(mixture: str) -> Callable[[Given], Numbers]:
    """Return the arm that draws sources in this fixed way."""
    return lambda given: given.fit(given.data(mixture))


def tuned(**options: Any) -> Callable[[Given], Numbers]:
    """Return the arm that tunes the shares in the fit."""

    def run(given: Given) -> Numbers:
        data = given.data("tuned")
        weights = GroupWeights(data.names)
        found = given.fit(data, HypergradientCallback(weights, **options))
        return {**found, **{name: float(value) for name, value in weights.values().items()}}

    return run


def bandit(given: Given) -> Numbers:
    """Draw sources by online data mixing."""
    data = given.data("tuned")
    mixing = OnlineDataMixing(data.names)
    found = given.fit(data, mixing)
    return {**found, **{name: float(value) for name, value in mixing.weights.values().items()}}


def alone(source: str) -> Callable[[Given], Numbers]:
    """Return the arm that trains on one source."""

    def run(given: Given) -> Numbers:
        data = given.data("uniform")
        if source not in data.names:
            return {"perplexity": math.nan, "seconds": 0.0}
        rows = data.source == data.names.index(source)
        data.train_rows, data.source, data.names = data.train_rows[rows], data.source[rows], (source,)
        data.train_dataloader = lambda: data._loader(  # type: ignore[method-assign]
            data.train_rows,
            batch_size=BATCH,
            drop_last=True,
            # The epochs of the other arms, so that the rate falls as there.
            sampler=RandomSampler(data.train_rows, replacement=False, num_samples=data.epoch_rows),
        )
        return given.fit(data)

    return run


MIXTURE = Experiment(
    question=f"Words of CPython's help topics, from a mixture of {', '.join(SOURCES)}, without any of their own: LSTM "
    "of 80 units, 400 steps of 32 rows of 20 words in every arm",
    prepare=prepare,
    arms={
        "proportional": given_shares("proportional"),
        "uniform": given_shares("uniform"),
        "tuned shares (GroupWeights), one line": tuned(),
        "the same, 60 outer steps of four batches": tuned(every_n_steps=6, train_batches=4),
        "online data mixing (ODM)": bandit,
        **{f"{source} alone": alone(source) for source in SOURCES},
    },
    columns={
        "perplexity": Column(title="test perplexity", digits=1),
        **{source: Column(title=source, digits=2) for source in SOURCES},
    },
)
