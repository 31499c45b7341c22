"""Hypernetworks of deep networks with more than a hundred hyperparameters, beside a run whose values stay at the start.

That run is trained like the other one, under values that are perturbed around the start: the plain training with the
start values is not in the comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

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

EPOCHS = 40


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
    """Eight layers over the rows of an image: 12 tensors in each, one dropout rate for each residual."""

    def __init__(self, width: int = 16, depth: int = 8) -> None:
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


def hyperparameters() -> list[Hyperparameter]:
    """Return a decay per tensor, biases and norms too, dropout rates, augmentation and label smoothing."""
    return [
        WeightDecay(init=1e-4, include=["*"], transform=Exp(lower=1e-6, upper=1e-1)),
        DropoutRates(upper=0.6),
        Brightness(init=0.1, upper=0.5),
        Contrast(init=0.1, upper=0.5),
        InputNoise(init=0.1, upper=0.5),
        Cutout(length=1, holes=1, max_length=4, max_holes=2),
        LabelSmoothing(init=0.05, upper=0.2),
    ]


@dataclass
class Given:
    """Digits of one seed."""

    data: DigitsDataModule
    seed: int
    epochs: int

    def fit(self, network: Callable[[], nn.Module], *, outer_rate: float) -> Numbers:
        """Return losses and accuracy of the network that was tuned, and how many hyperparameters it had."""
        seed_everything(self.seed, verbose=False)
        cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=self.epochs)
        module = TunedImageClassifier(
            network(),
            hyperparameters(),
            loop=DeltaSTN(warmup_steps=14 * self.epochs // 10, perturbation=LearnedScale(init=0.5)),
            weights_optimizer=partial(torch.optim.Adam, lr=3e-3),
            response_optimizer=partial(torch.optim.Adam, lr=3e-3),
            outer_optimizer=partial(torch.optim.Adam, lr=outer_rate),
            scale_optimizer=partial(torch.optim.Adam, lr=0.01),
            weights_scheduler=cosine,
            response_scheduler=cosine,
            options=ResponseOptions(log_every_n_outer_steps=0),
        )
        steps = self.epochs * len(self.data.train_images) // 50
        before = time.process_time()
        plain_trainer(steps).fit(module, datamodule=self.data)
        seconds = time.process_time() - before
        plain = module.export().eval()
        with torch.no_grad():
            val, test = (
                (plain(images), labels)
                for images, labels in (
                    (self.data.val_images, self.data.val_labels),
                    (self.data.test_images, self.data.test_labels),
                )
            )
        return {
            "count": float(sum(t.numel() for t in module.vector.tensors)),
            "val": float(cross_entropy(*val)),
            "test": float(cross_entropy(*test)),
            "accuracy": float((test[0].argmax(1) == test[1]).float().mean()),
            "seconds": seconds,
        }


def prepare(seed: int, size: str) -> Given:
    """Draw the digits."""
    data = DigitsDataModule(train_size=350, val_size=350, batch_size=50, val_batch_size=175, seed=seed)
    data.setup()
    return Given(data, seed, 2 if size == "smoke" else EPOCHS)


def arms(network: Callable[[], nn.Module]) -> Mapping[str, Callable[[Given], Numbers]]:
    """Return both arms: the same training, around values that rest and around values that are tuned."""
    return {
        "perturbed around the start values": lambda given: given.fit(network, outer_rate=0.0),
        "Delta-STN": lambda given: given.fit(network, outer_rate=0.05),
    }


COLUMNS = {
    "count": Column(title="hyperparameters", digits=0),
    "val": Column(title="validation loss"),
    "test": Column(title="test loss"),
    "accuracy": Column(title="test accuracy", percent=True),
}
QUESTION = "Digits, 350 images to train on and 350 for validation, 40 epochs; a decay per tensor, dropout, augmentation"
SEEDS: Sequence[int] = (10, 11, 12)
RESNET = Experiment(
    question=f"ResNet of 34 convolutions. {QUESTION}",
    prepare=prepare,
    arms=arms(resnet),
    columns=COLUMNS,
    seeds=SEEDS,
)
TRANSFORMER = Experiment(
    question=f"Transformer of eight layers. {QUESTION}",
    prepare=prepare,
    arms=arms(Transformer),
    columns=COLUMNS,
    seeds=SEEDS,
)
