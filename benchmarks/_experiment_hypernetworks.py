"""Hypernetworks of deep networks with more than a hundred hyperparameters, beside fixed values and small searches.

A search has three trials: about what the hypernetwork's training costs. Every arm begins with the same weights, and is
judged at the end of its training; a search, at that of its best trial by validation loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_nested import DigitsDataModule, TunedImageClassifier
from lightning_nested.hypernetworks import LearnedScale
from lightning_nested.hyperparameters import (
    Brightness,
    Contrast,
    Cutout,
    DropoutRates,
    Exp,
    Hyperparameter,
    InputNoise,
    LabelSmoothing,
    WeightDecay,
)
from lightning_nested.modules import DeltaSTN, ResponseOptions

RATE = 5e-3
DECAY, LEAST, MOST = 1e-4, 1e-6, 1e-1  # at the start, and the range of all


class Block(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return an image of the same shape."""
        return torch.relu(x + self.body(x))


def resnet() -> nn.Module:
    """A ResNet of 34 convolutions and as many normalisations: 102 tensors and those of the last layer."""
    width, depth = 8, 16
    blocks = [Block(width) for _ in range(depth)]
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), *blocks[: depth // 2],
        nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        *blocks[depth // 2 :], nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4 * width, 10),
    )  # fmt: skip


class Transformer(nn.Module):
    """Six layers over the rows of an image: 12 tensors in each, one dropout rate for each residual."""

    def __init__(self, width: int = 16, depth: int = 6) -> None:
        super().__init__()
        self.into, self.places = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.out = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = self.into(images.squeeze(1)) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.out(x.mean(1))  # type: ignore[no-any-return]


def hyperparameters(decay: float) -> list[Hyperparameter]:
    """Return a decay per tensor, biases and norms too, dropout rates, augmentation and label smoothing."""
    return [
        WeightDecay(init=decay, include=["*"], transform=Exp(lower=LEAST, upper=MOST)),
        DropoutRates(upper=0.6),
        Brightness(init=0.1, upper=0.5),
        Contrast(init=0.1, upper=0.5),
        InputNoise(init=0.1, upper=0.5),
        Cutout(length=1, holes=1, max_length=4, max_holes=2),
        LabelSmoothing(init=0.05, upper=0.2),
    ]


def drawn(hyperparameters: Sequence[Hyperparameter], generator: torch.Generator) -> Tensor:
    """Return unconstrained values, (n,): log decays and the others' natural values are uniform over their ranges."""
    pieces = []
    for hyperparameter in hyperparameters:
        size = sum(t.numel() for t in hyperparameter.tensors.values())
        uniform = 0.01 + 0.98 * torch.rand(size, generator=generator)
        decays = isinstance(hyperparameter, WeightDecay)
        pieces.append(math.log(LEAST) + math.log(MOST / LEAST) * uniform if decays else uniform.logit())
    return torch.cat(pieces)


@dataclass
class Given:
    """Digits and network of one seed, and the scores of the first arm, once it ran."""

    data: DigitsDataModule
    network: Callable[[], nn.Module]
    seed: int
    epochs: int
    first: Numbers = field(default_factory=dict)

    def module(self, decay: float = DECAY) -> TunedImageClassifier:
        """Return the network at the weights that every arm begins with, and its hyperparameters at their start."""
        seed_everything(self.seed, verbose=False)
        return TunedImageClassifier(
            self.network(),
            hyperparameters(decay),
            loop=DeltaSTN(warmup_steps=14 * self.epochs // 10, perturbation=LearnedScale(init=0.5)),
            weights_optimizer=partial(torch.optim.Adam, lr=RATE),
            response_optimizer=partial(torch.optim.Adam, lr=1e-3),
            outer_optimizer=partial(torch.optim.Adam, lr=0.03),
            scale_optimizer=partial(torch.optim.Adam, lr=0.01),
            weights_scheduler=self.annealed,
            response_scheduler=self.annealed,
            options=ResponseOptions(log_every_n_outer_steps=0),
        )

    def annealed(self, optimizer: torch.optim.Optimizer) -> CosineAnnealingLR:
        """Return the schedule of the rates of weights and response."""
        return CosineAnnealingLR(optimizer, T_max=self.epochs)

    def tune(self) -> Numbers:
        """Return the scores of the network that was tuned while it was trained."""
        module = self.module()
        steps = self.epochs * len(self.data.train_images) // 50
        before = time.process_time()
        plain_trainer(steps).fit(module, datamodule=self.data)
        seconds = time.process_time() - before
        return {**self.scores(module.export().eval()), "count": float(len(module.vector)), "seconds": seconds}

    def train(self, module: TunedImageClassifier, h: Tensor | None = None) -> Numbers:
        """Return the scores of the plain network, trained with its start values or with ``h`` held fixed."""
        h = module.vector.flat().detach() if h is None else h
        optimizer = torch.optim.Adam(module.network.general_parameters().values(), lr=RATE)
        scheduler, loader = self.annealed(optimizer), self.data.train_dataloader()
        before = time.process_time()
        for _ in range(self.epochs):
            for batch in loader:
                optimizer.zero_grad()
                module.training_loss(batch, h, "general").backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            scheduler.step()
        seconds = time.process_time() - before
        with module.eval().network.at(h, "general"):
            return {**self.scores(module.network), "seconds": seconds}

    @torch.no_grad()
    def scores(self, network: nn.Module) -> dict[str, float]:
        """Return losses and accuracy of a network in evaluation mode."""
        val = cross_entropy(network(self.data.val_images), self.data.val_labels)
        logits, labels = network(self.data.test_images), self.data.test_labels
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"val": float(val), "test": float(cross_entropy(logits, labels)), "accuracy": float(accuracy)}


def prepare(network: Callable[[], nn.Module], epochs: int, seed: int, size: str) -> Given:
    """Draw the digits."""
    data = DigitsDataModule(train_size=350, val_size=350, batch_size=50, val_batch_size=175, seed=seed)
    data.setup()
    return Given(data, network, seed, 2 if size == "smoke" else epochs)


def held_fixed(given: Given) -> Numbers:
    """Train with the values that the hypernetwork starts at."""
    given.first = given.train(given.module())
    return given.first


def best_of(trials: Sequence[Numbers]) -> Numbers:
    """Return the numbers of the trial with the least validation loss, at the cost of all."""
    best = min(trials, key=lambda trial: trial["val"])
    return {**best, "seconds": sum(trial["seconds"] for trial in trials)}


def at_random(given: Given) -> Numbers:
    """Draw every hyperparameter alone, three times."""
    generator, trials = torch.Generator().manual_seed(given.seed), []
    for _ in range(3):
        module = given.module()
        trials.append(given.train(module, drawn(module.vector.hyperparameters, generator)))
    return best_of(trials)


def by_hand(given: Given) -> Numbers:
    """Try the decay of the start and two larger ones, the same for all tensors."""
    return best_of([given.first, *(given.train(given.module(decay)) for decay in (1e-3, 1e-2))])


ARMS: Mapping[str, Callable[[Given], Numbers]] = {
    "start values held fixed": held_fixed,
    "Delta-STN": Given.tune,
    "random search, 3 trials": at_random,
    "one decay by hand, 3 trials": by_hand,
}
COLUMNS = {
    "val": Column(title="validation loss"),
    "test": Column(title="test loss"),
    "accuracy": Column(title="test accuracy", percent=True),
    "count": Column(title="hyperparameters", digits=0),
}
QUESTION = "Digits, 350 images to train on and 350 for validation; a decay per tensor, dropout, augmentation"
SEEDS: Sequence[int] = (10, 11, 12)
RESNET = Experiment(
    question=f"ResNet of 34 convolutions, 20 epochs. {QUESTION}",
    prepare=partial(prepare, resnet, 20),
    arms=ARMS,
    columns=COLUMNS,
    seeds=SEEDS,
)
TRANSFORMER = Experiment(
    question=f"Transformer of six layers, 40 epochs. {QUESTION}",
    prepare=partial(prepare, Transformer, 40),
    arms=ARMS,
    columns=COLUMNS,
    seeds=SEEDS,
)
