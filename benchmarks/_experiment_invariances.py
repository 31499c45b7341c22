"""How far test images are turned, shifted and scaled, learned from validation images within one fit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested import (
    Current,
    FashionMNISTDataModule,
    HypergradientCallback,
    Neumann,
    Rotation,
    Scaling,
    Translation,
)
from lightning_nested.networks import SmallCNN

# By what the validation and test images were changed: degrees, share of the side, share of the size.
TRUE = {"rotation": 40.0, "translation": 0.1, "scaling": 0.25}
KINDS: dict[str, Callable[..., Any]] = {"rotation": Rotation, "translation": Translation, "scaling": Scaling}
START = {"rotation": 10.0, "translation": 0.03, "scaling": 0.05}
UPPER = {"rotation": 180.0, "translation": 0.5, "scaling": 0.9}
# A look ahead overstates what augmentation costs: ranges are tuned at the current weights.
CHOSEN: dict[str, Any] = {
    "at": Current(),
    "solver": Neumann(num_terms=5),
    "optimizer": lambda tensors: torch.optim.Adam(tensors, lr=0.1),
    "every_n_steps": 20,
}


def strengths(values: Mapping[str, float]) -> list[Any]:
    """Return augmentations of these strengths, ready to use."""
    made = [KINDS[name](init=value) for name, value in values.items()]
    for strength in made:
        strength.build({"weight": torch.zeros(1)})
    return made


@torch.no_grad()
def changed(images: Tensor, true: Mapping[str, float], seed: int) -> Tensor:
    """Return images that are changed by the true ranges, each once and for all."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for strength in strengths(true):
            images = strength(images)
    return images


class Classifier(LightningModule):
    """A small CNN; training images are augmented by what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.network: nn.Module = SmallCNN(width=8)
        self.rotation: Any = None
        self.translation: Any = None
        self.scaling: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of augmented images."""
        images, labels = batch
        for augment in (self.rotation, self.translation, self.scaling):
            images = images if augment is None else augment(images)
        return cross_entropy(self.network(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of the images as they are."""
        return cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.0)

    @torch.no_grad()
    def score(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Return loss and accuracy."""
        self.eval()
        logits = torch.cat([self.network(part) for part in images.split(500)])
        return float(cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


@dataclass
class Given:
    """Images of one seed: upright ones to train on, changed ones to validate and test on."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    true: Mapping[str, float]
    seed: int
    steps: int

    def fit(self, values: Mapping[str, float], *callbacks: Callback) -> tuple[Classifier, float]:
        """Return the trained module and the CPU time of the fit."""
        seed_everything(self.seed, verbose=False)
        module = Classifier()
        for strength in strengths(values):
            setattr(module, strength.name, strength)
        train = DataLoader(TensorDataset(*self.train), batch_size=100, shuffle=True, drop_last=True)
        val = DataLoader(TensorDataset(*self.val), batch_size=250, shuffle=True)
        before = time.process_time()
        plain_trainer(self.steps, callbacks).fit(module, train, val)
        return module, time.process_time() - before

    def numbers(self, module: Classifier, seconds: float, values: Mapping[str, float]) -> Numbers:
        """Return accuracy, and what was found over what is true."""
        loss, accuracy = module.score(*self.test)
        shares = {name: values[name] / self.true[name] for name in values}
        val_loss = module.score(*self.val)[0]
        return {"accuracy": accuracy, "loss": loss, "val_loss": val_loss, "seconds": seconds, **shares}


def prepare(true: Mapping[str, float]) -> Callable[[int, str], Given]:
    """Return the function that draws the images, and changes those that are not trained on by these ranges."""

    def given(seed: int, size: str) -> Given:
        smoke = size == "smoke"
        train, val, test = (100, 60, 60) if smoke else (5_000, 1_000, 5_000)
        data = FashionMNISTDataModule(train_size=train, val_size=val, seed=seed)
        data.setup()
        return Given(
            (data.train_images, data.train_labels),
            (changed(data.val_images, true, seed + 1000), data.val_labels),
            (changed(data.test_images[:test], true, seed + 2000), data.test_labels[:test]),
            true,
            seed,
            6 if smoke else 1_500,
        )

    return given


def none(given: Given) -> Numbers:
    """Train on upright images."""
    module, seconds = given.fit({})
    return given.numbers(module, seconds, {})


def known(factor: float = 1.0) -> Callable[[Given], Numbers]:
    """Return the arm that trains with the ranges that nobody knows, or so many times them."""

    def arm(given: Given) -> Numbers:
        values = {name: factor * value for name, value in given.true.items()}
        module, seconds = given.fit(values)
        return given.numbers(module, seconds, values)

    return arm


def tuned(**options: Any) -> Callable[[Given], Numbers]:
    """Return the arm that learns the ranges within the fit."""

    def arm(given: Given) -> Numbers:
        made = [KINDS[name](init=START[name]) for name in given.true]
        module, seconds = given.fit({}, HypergradientCallback(made, **options))
        return given.numbers(module, seconds, {s.name: float(s.value()) for s in made})

    return arm


def searched(trials: int) -> Callable[[Given], Numbers]:
    """Return the arm that searches with TPE, and keeps the best training by its validation loss."""

    def arm(given: Given) -> Numbers:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        total, best = 0.0, (math.inf, None, START)

        def objective(trial: Any) -> float:
            nonlocal total, best
            values = {n: trial.suggest_float(n, START[n] / 4, UPPER[n] * 0.9, log=True) for n in given.true}
            module, seconds = given.fit(values)
            loss, total = module.score(*given.val)[0], total + seconds
            best = min(best, (loss, module, values), key=lambda found: found[0])
            return loss

        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=given.seed))
        study.optimize(objective, n_trials=trials if given.steps > 100 else 1)
        assert best[1] is not None
        return given.numbers(best[1], total, best[2])

    return arm


COLUMNS = {
    "accuracy": Column(title="test accuracy", percent=True),
    "loss": Column(title="test loss"),
    "val_loss": Column(title="validation loss"),
    **{name: Column(title=f"{name} / true", digits=2) for name in TRUE},
}
INVARIANCES = Experiment(
    question="Fashion-MNIST, 5 000 upright images to train on; validation (1 000) and test images turned by up to "
    "40 degrees, shifted by up to a tenth, scaled by up to a quarter; small CNN, 1 500 steps of AdamW",
    prepare=prepare(TRUE),
    arms={
        "no augmentation": none,
        "tuned in one fit": tuned(**CHOSEN),
        "tuned in one fit, the default": tuned(),
        "TPE, 2 trainings": searched(2),
        "TPE, 16 trainings": searched(16),
        "the true ranges": known(),
    },
    columns=COLUMNS,
)
# Where the validation loss itself has its least value, beside what one fit finds.
ROTATION = Experiment(
    question="Fashion-MNIST, 5 000 upright images to train on; validation (1 000) and test images turned by up to "
    "40 degrees; small CNN, 1 500 steps of AdamW",
    prepare=prepare({"rotation": 40.0}),
    arms={
        "no augmentation": none,
        "tuned in one fit": tuned(**CHOSEN),
        **{f"{40 * factor:.0f} degrees": known(factor) for factor in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)},
    },
    columns={key: COLUMNS[key] for key in ("accuracy", "loss", "val_loss", "rotation")},
)
