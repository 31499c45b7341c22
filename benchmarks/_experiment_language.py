"""An LSTM on words: dropout rates and penalties within one fit, beside search and settings by hand."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from _language_scores import mean_loss
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_nested import (
    DropConnect,
    DropoutRates,
    HypergradientCallback,
    LanguageModel,
    PydocTextDataModule,
    Scalar,
)
from lightning_nested.hyperparameters import Exp

WORDS, WIDTH, RATE = 1000, 80, 1e-2
NONE: Mapping[str, float] = {}
# Chosen on seed 100.
BY_HAND = {
    "word_dropout": 0.1,
    "input_dropout": 0.2,
    "output_dropout": 0.4,
    "weight_dropout": 0.2,
    "alpha": 0.5,
    "beta": 0.5,
}


class BestEpoch(Callback):
    """Keeps the weights of the epoch with the least validation loss: early stopping."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.loss = rows, math.inf
        self.weights: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the validation loss."""
        loss = mean_loss(pl_module, self.rows)
        if loss < self.loss:
            self.loss, self.weights = loss, copy.deepcopy(pl_module.network.state_dict())


@dataclass
class Given:
    """Text of a seed, and the length of a fit."""

    data: PydocTextDataModule
    seed: int
    steps: int

    def fit(self, fixed: Mapping[str, float], *callbacks: Callback) -> tuple[float, float, float]:
        """Return validation and test loss of the best epoch, and the CPU time of the fit."""
        seed_everything(self.seed, verbose=False)
        dropouts = {
            name: rate
            for name, rate in fixed.items()
            if name in ("word_dropout", "input_dropout", "output_dropout")
        }
        epochs = math.ceil(self.steps / (len(self.data.train_rows) // self.data.batch_size))
        module = LanguageModel(
            "lstm",
            vocabulary_size=WORDS,
            network_options={"width": WIDTH, **dropouts},
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=RATE),
            scheduler=lambda optimizer: CosineAnnealingLR(optimizer, epochs),
            **{name: value for name, value in fixed.items() if name not in dropouts},
        )
        best = BestEpoch(self.data.val_rows)
        trainer = plain_trainer(self.steps, [*callbacks, best], gradient_clip_val=0.5)
        before = time.process_time()
        trainer.fit(module, datamodule=self.data)
        seconds = time.process_time() - before
        module.network.load_state_dict(best.weights)
        return best.loss, mean_loss(module, self.data.test_rows), seconds


def prepare(seed: int, size: str) -> Given:
    """Return 10 000 words to learn from, and a tenth of the text to validate on."""
    smoke = size == "smoke"
    data = PydocTextDataModule(
        seed=seed,
        train_tokens=2_000 if smoke else 10_000,
        vocabulary_size=WORDS,
        length=20,
        batch_size=16,
        val_fraction=0.01 if smoke else 0.1,
        test_fraction=0.01 if smoke else 0.1,
    )
    data.setup()
    return Given(data, seed, 12 if smoke else 500)


def fixed(values: Mapping[str, float]) -> Callable[[Given], Numbers]:
    """Return the arm of these rates and penalties."""

    def arm(given: Given) -> Numbers:
        _, test, seconds = given.fit(values)
        return {"perplexity": math.exp(test), "seconds": seconds}

    return arm


def tuned(per: Literal["model", "parameter"], **options: Any) -> Callable[[Given], Numbers]:
    """Return the arm that tunes them in one fit, with one rate of recurrent weights or one for each."""

    def arm(given: Given) -> Numbers:
        positive = Exp(lower=1e-3, upper=10.0)
        rates = [
            DropoutRates(init=0.3, temperature=TEMPERATURE),
            DropConnect(0.3, include="*weight_hh*", per=per, temperature=TEMPERATURE),
            Scalar("alpha", 0.5, positive),
            Scalar("beta", 0.5, positive),
        ]
        callback = HypergradientCallback(rates, **options)
        _, test, seconds = given.fit(NONE, callback)
        found = callback.values()
        shown = dict(zip(("words", "input", "output"), found["dropout"].tolist(), strict=True))
        return {"perplexity": math.exp(test), "seconds": seconds, **shown}

    return arm


TEMPERATURE = 0.2


def searched(sampler: Literal["random", "TPE"], count: int) -> Callable[[Given], Numbers]:
    """Return the arm of a search of so many trials, whose best one by validation counts."""

    def arm(given: Given) -> Numbers:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        kinds = {
            "random": optuna.samplers.RandomSampler(seed=given.seed),
            # Other first draws than those of the random search.
            "TPE": optuna.samplers.TPESampler(seed=given.seed + 1000, n_startup_trials=3),
        }
        study = optuna.create_study(sampler=kinds[sampler])
        total, trials = 0.0, []
        for _ in range(count if given.steps > 100 else 1):
            trial = study.ask()
            values = {
                name: trial.suggest_float(name, 0.02, 0.8) for name in BY_HAND if name.endswith("dropout")
            }
            values |= {name: trial.suggest_float(name, 1e-2, 10.0, log=True) for name in ("alpha", "beta")}
            val, test, seconds = given.fit(values)
            total += seconds
            study.tell(trial, val)
            trials.append((val, test))
        return {"perplexity": math.exp(min(trials)[1]), "seconds": total}

    return arm


ARMS: dict[str, Callable[[Given], Numbers]] = {
    "no dropout, no penalty": fixed(NONE),
    "by hand": fixed(BY_HAND),
    "6 hyperparameters, one fit": tuned("model"),
    "a rate per recurrent weight, one fit": tuned("parameter"),
    "random search, 2 trials": searched("random", 2),
    "TPE, 2 trials": searched("TPE", 2),
    "TPE, 8 trials": searched("TPE", 8),
}
if find_spec("optuna") is None:
    # See benchmarks/requirements.txt.
    ARMS = {name: arm for name, arm in ARMS.items() if not name.endswith("trials")}
COLUMNS = (
    ("perplexity", Column(title="test perplexity", digits=2)),
    ("words", Column(title="rate of words", digits=2)),
    ("input", Column(title="of inputs", digits=2)),
    ("output", Column(title="of outputs", digits=2)),
)
LANGUAGE = Experiment(
    question="Words of CPython's help topics, 10 000 to learn from, 1 000 symbols; LSTM of 80 units, 500 steps of "
    "Adam with a cosine; test perplexity of the best epoch by validation, in every arm",
    prepare=prepare,
    arms=ARMS,
    columns=dict(COLUMNS),
)
