"""Tables with columns of noise: many regularizers within one fit, beside Optuna's search for one."""

from __future__ import annotations

import csv
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _arms import Column, Experiment, Numbers, auroc
from _fits import plain_trainer
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested import FeatureDecay, HypergradientCallback, TabularDataModule, WeightDecay


class Table(LightningModule):
    """An MLP on a table, with a decay for each input feature if one is tuned."""

    feature_decay: Any = None

    def __init__(self, features: int, outputs: int, decay: float) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(features, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, outputs)
        )
        self.decay = decay

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Return cross-entropy, or the mean squared error."""
        out = self.network(batch[0])
        return (
            functional.mse_loss(out, batch[1])
            if batch[1].is_floating_point()
            else functional.cross_entropy(out, batch[1])
        )

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss, with the decay of the features."""
        loss = self.loss(batch)
        return loss if self.feature_decay is None else loss + self.feature_decay(self.network[0].weight)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3, weight_decay=self.decay)

    @torch.no_grad()
    def score(self, inputs: Tensor, target: Tensor) -> float:
        """Return the loss on whole data."""
        self.eval()
        return float(self.loss((inputs, target)))


@dataclass
class Given:
    """A table of one seed."""

    data: TabularDataModule
    seed: int
    steps: int
    trials: list[tuple[float, Table, float]] = field(
        default_factory=list
    )  # of the search: loss, network, seconds

    def fit(self, *callbacks: Callback, decay: float = 0.0) -> tuple[Table, float]:
        """Return a trained network and the CPU time of the fit."""
        seed_everything(self.seed, verbose=False)
        module = Table(self.data.num_features, self.data.num_classes or 1, decay)
        before = time.process_time()
        plain_trainer(self.steps, callbacks).fit(module, datamodule=self.data)
        return module, time.process_time() - before

    def numbers(self, module: Table, seconds: float, decays: Tensor | None = None) -> Numbers:
        """Return the test loss, and how well columns of noise are told by small weights and by large decays."""
        sizes = module.network[0].weight.detach().square().sum(0)
        found = {
            "loss": module.score(self.data.test_inputs, self.data.test_target),
            "by_weights": self.auroc(-sizes),
            "seconds": seconds,
        }
        return found if decays is None else found | {"by_decays": self.auroc(rounded(decays))}

    def auroc(self, scores: Tensor) -> float:
        """Return the probability that a column of noise has a higher score than another one."""
        return auroc(scores, self.data.noise)


def rounded(scores: Tensor) -> Tensor:
    """Return scores in millionths of the largest: those that differ by rounding in float32 alone become equal."""
    scores = scores.double()
    return (scores / (1e-6 * scores.abs().max().clamp_min(1e-300))).round()


def prepare(
    source: str | Callable[[str], str], noise: int, train: int, val: int, **options: Any
) -> Callable[[int, str], Given]:
    """Return the function that draws a table."""

    def given(seed: int, size: str) -> Given:
        data = TabularDataModule(
            source if isinstance(source, str) else source(size),
            noise_columns=noise,
            train_size=train,
            val_size=val,
            seed=seed,
            **options,
        )
        data.setup()
        return Given(data, seed, 40 if size == "smoke" else 800)

    return given


# The columns of numbers, and the words of the others.
_DIAMONDS: Mapping[str, Sequence[str] | None] = {
    "carat": None,
    "cut": ("Fair", "Good", "Very Good", "Premium", "Ideal"),
    "color": tuple("DEFGHIJ"),
    "clarity": ("I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"),
    **dict.fromkeys(("depth", "table", "price", "x", "y", "z")),
}


def diamonds(size: str) -> str:
    """Return the path of the 53 940 diamonds that plotnine ships; for a smoke run, of 900 rows like them.

    Raises:
        FileNotFoundError: plotnine is not installed.
    """
    if size == "smoke":
        path = Path(tempfile.mkdtemp()) / "diamonds.csv"
        draw = random.Random(0)
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(_DIAMONDS)
            for _ in range(900):
                rows.writerow(
                    [draw.choice(w) if w else round(draw.gauss(5, 1), 2) for w in _DIAMONDS.values()]
                )
        return str(path)
    found = find_spec("plotnine")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        path = Path(folder) / "data" / "diamonds.csv"
        if path.is_file():
            return str(path)
    raise FileNotFoundError(
        "diamonds.csv must be in the folder of plotnine. Got none; pip install --no-deps plotnine."
    )


def correlation(given: Given) -> float:
    """Return how well a small correlation of a column with the target tells noise: no network at all."""
    x, y = given.data.train_inputs, given.data.train_target.float().reshape(-1, 1)
    return given.auroc(-((y - y.mean()) * (x - x.mean(0))).mean(0).abs())


def plain(given: Given) -> Numbers:
    """Train without a decay."""
    return {**given.numbers(*given.fit()), "by_correlation": correlation(given)}


def searched(count: int) -> Callable[[Given], Numbers]:
    """Return the arm of Optuna's TPE over one decay: the best of so many trainings by the validation data.

    The decay is Adam's own, which is one of biases too.
    """

    def arm(given: Given) -> Numbers:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=given.seed))
        wanted = count if given.steps > 100 else 1

        def objective(trial: Any) -> float:
            module, seconds = given.fit(decay=trial.suggest_float("decay", 1e-5, 1.0, log=True))
            loss = module.score(given.data.val_inputs, given.data.val_target)
            given.trials.append((loss, module, seconds))
            return loss

        # A shorter search is the beginning of a longer one.
        if len(given.trials) < wanted:
            given.trials.clear()
            study.optimize(objective, n_trials=wanted)
        trials = given.trials[:wanted]
        _, module, _ = min(trials, key=lambda trial: trial[0])
        return given.numbers(module, sum(seconds for _, _, seconds in trials))

    return arm


def one_decay(given: Given) -> Numbers:
    """Tune a decay per tensor."""
    return given.numbers(*given.fit(HypergradientCallback(WeightDecay())))


def every_weight(given: Given) -> Numbers:
    """Tune a decay per weight."""
    decay = WeightDecay(per="parameter")
    module, seconds = given.fit(HypergradientCallback(decay))
    return given.numbers(module, seconds, decay.values()["network.0.weight"].log().mean(0))


def features(given: Given) -> Numbers:
    """Tune a decay per feature and one per later tensor."""
    decay = FeatureDecay(given.data.num_features, init=0.01)
    layers = WeightDecay(exclude=["*.bias", "network.0.weight"])
    callback = HypergradientCallback([decay, layers], optimizer=lambda found: torch.optim.Adam(found, lr=0.3))
    module, seconds = given.fit(callback)
    return given.numbers(module, seconds, decay.values()["decay"].log())


ARMS = {
    "plain": plain,
    "a decay per tensor, one fit": one_decay,
    "a decay per weight, one fit": every_weight,
    "a decay per feature and layer, one fit": features,
    "TPE, 16 trainings, one decay": searched(16),
    "TPE, its first 6 trainings": searched(6),
}
if find_spec("optuna") is None:
    # See benchmarks/requirements.txt.
    ARMS = {name: arm for name, arm in ARMS.items() if not name.startswith("TPE")}
COLUMNS = {
    "loss": Column(title="test loss"),
    "by_decays": Column(title="AUROC of noise, by decays", digits=2),
    "by_weights": Column(title="by weights", digits=2),
    "by_correlation": Column(title="by correlation", digits=2),
}
BREAST_CANCER = Experiment(
    question="Breast cancer, 30 columns and 100 of noise, 220 rows to train on, MLP 130-48-48-2, 800 steps of Adam",
    prepare=prepare("breast_cancer", 100, 220, 110),
    arms=ARMS,
    columns=COLUMNS,
)
DIABETES = Experiment(
    question="Diabetes, 10 columns and 40 of noise, 200 rows to train on, MLP 50-48-48-1, 800 steps of Adam",
    prepare=prepare("diabetes", 40, 200, 100),
    arms=ARMS,
    columns=COLUMNS,
)
DIAMONDS = Experiment(
    question="Prices of diamonds, 26 columns and 50 of noise, 500 rows to train on, MLP 76-48-48-1, 800 steps of Adam",
    prepare=prepare(diamonds, 50, 500, 250, target="price"),
    arms=ARMS,
    columns=COLUMNS,
)
