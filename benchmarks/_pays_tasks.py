"""Eight small real tasks on which a network overfits: images, wrong labels, tables with noise columns, text."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.datamodules import FashionMNISTDataModule

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data and a way to train on them.

    Attributes:
        data: Function from a seed to training, validation and test examples.
        network: Function that makes a network.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        schedule: ``"constant"`` or ``"cosine"``.
    """

    name: str
    data: Callable[[int], tuple[Pair, Pair, Pair]]
    network: Callable[[], nn.Module]
    optimizer: str
    rate: float
    steps: int
    batch: int = 64
    schedule: str = "constant"
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    counts: bool = True  # whether there is an accuracy

    def make_optimizer(self, parameters: Any, decay: float | None) -> torch.optim.Optimizer:
        """Return the inner optimizer; a decay of None is torch's default."""
        given = {} if decay is None else {"weight_decay": decay}
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.rate, momentum=0.9, **given)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, lr=self.rate, **given)

    @property
    def grid(self) -> list[float]:
        """Eleven fixed decays."""
        first = -3.0 if self.optimizer == "adamw" else -5.0
        return [0.0] + [10 ** (first + i / 2) for i in range(10)]


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Return a multilayer perceptron."""
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    """Return a small convolutional network with batch norm."""

    def block(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1, stride=2), nn.BatchNorm2d(o), nn.ReLU()]

    return nn.Sequential(
        *block(1, 12), *block(12, 24), nn.Flatten(), nn.Linear(24 * 49, 48), nn.ReLU(), nn.Linear(48, 10)
    )


class LSTM(nn.Module):
    """Next characters by an LSTM."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(symbols, 24), nn.LSTM(24, 80, batch_first=True)
        self.head = nn.Linear(80, symbols)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, symbols, length)."""
        return self.head(self.recurrent(self.embedding(x))[0]).transpose(1, 2)


class Transformer(nn.Module):
    """Next characters by two layers of torch's own transformer."""

    def __init__(self, symbols: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 40)
        self.position = nn.Parameter(0.02 * torch.randn(length, 40))
        layer = nn.TransformerEncoderLayer(40, 4, 120, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(40, symbols)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, symbols, length)."""
        return self.head(
            self.layers(self.embedding(x) + self.position, mask=self.mask, is_causal=True)
        ).transpose(1, 2)


def _split(x: Tensor, y: Tensor, train: int, val: int, seed: int) -> tuple[Pair, Pair, Pair]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    edge = train + val
    return (x[:train], y[:train]), (x[train:edge], y[train:edge]), (x[edge:], y[edge:])


def _wrong(y: Tensor, share: float, classes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    hit = torch.rand(len(y), generator=generator) < share
    return torch.where(hit, (y + torch.randint(1, classes, y.shape, generator=generator)) % classes, y)


def fashion(
    train: int, val: int, *, wrong: float = 0.0, flat: bool = True
) -> Callable[[int], tuple[Pair, Pair, Pair]]:
    """Return a function that draws images; the last 6 000 of Fashion-MNIST's test images judge."""

    def data(seed: int) -> tuple[Pair, Pair, Pair]:
        source = FashionMNISTDataModule(train_size=train, val_size=val, seed=seed)
        source.prepare_data()
        source.setup("fit")
        mean, scale = source.train_images.mean(), source.train_images.std()

        def images(x: Tensor) -> Tensor:
            x = (x - mean) / scale
            return x.flatten(1) if flat else x

        labels = _wrong(source.train_labels, wrong, 10, seed) if wrong else source.train_labels
        return (
            (images(source.train_images), labels),
            (images(source.val_images), source.val_labels),
            (images(source.test_images[-6000:]), source.test_labels[-6000:]),
        )

    return data


def table(
    load: Callable[[], Any], noise: int, train: int, val: int, *, regression: bool = False
) -> Callable[[int], tuple[Pair, Pair, Pair]]:
    """Return a function that draws rows of one of scikit-learn's tables, with columns of noise."""

    def data(seed: int) -> tuple[Pair, Pair, Pair]:
        source = load()
        x = torch.tensor(source.data, dtype=torch.float32)
        x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
        generator = torch.Generator().manual_seed(seed + 2)
        x = torch.cat([x, torch.randn(len(x), noise, generator=generator)], dim=1)
        y = torch.tensor(source.target)
        if regression:
            y = y.float()[:, None]
            y = (y - y.mean()) / y.std()
        return _split(x, y.float() if regression else y.long(), train, val, seed)

    return data


def digits(train: int, val: int, wrong: float) -> Callable[[int], tuple[Pair, Pair, Pair]]:
    """Return a function that draws scikit-learn's digits, a share of the training labels wrong."""

    def data(seed: int) -> tuple[Pair, Pair, Pair]:
        source = datasets.load_digits()
        x, y = torch.tensor(source.data, dtype=torch.float32) / 16, torch.tensor(source.target)
        (x_train, y_train), validation, test = _split(x, y, train, val, seed)
        return (x_train, _wrong(y_train, wrong, 10, seed)), validation, test

    return data


def source_code(length: int) -> tuple[Tensor, int]:
    """Return rows of ``length`` + 1 characters of the standard library's code, and the number of characters."""
    names = ("argparse", "asyncio/base_events", "difflib", "doctest", "inspect", "statistics", "typing")
    folder = Path(argparse.__file__).parent
    text = "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in names)
    symbols = sorted(set(text))
    number = {c: i for i, c in enumerate(symbols)}
    rows = torch.tensor([number[c] for c in text])
    rows = rows[: len(rows) // (length + 1) * (length + 1)].view(-1, length + 1)
    return rows, len(symbols)


def code(length: int, train: int, val: int, test: int) -> Callable[[int], tuple[Pair, Pair, Pair]]:
    """Return a function that draws rows of code, to predict each next character."""

    def data(seed: int) -> tuple[Pair, Pair, Pair]:
        rows, _ = source_code(length)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))][
            : train + val + test
        ]
        return _split(rows[:, :-1], rows[:, 1:], train, val, seed)

    return data


LENGTH = 32
SYMBOLS = source_code(LENGTH)[1]
TASKS = (
    Task(
        name="fashion, MLP, SGD",
        data=fashion(3000, 600),
        network=lambda: mlp(784, 100, 50, 10),
        optimizer="sgd",
        rate=0.05,
        steps=1000,
        schedule="cosine",
    ),
    Task(
        name="fashion, CNN with batch norm, AdamW",
        data=fashion(2000, 500, flat=False),
        network=cnn,
        optimizer="adamw",
        rate=2e-3,
        steps=700,
        schedule="cosine",
    ),
    Task(
        name="fashion, 40 % wrong labels, Adam",
        data=fashion(2000, 500, wrong=0.4),
        network=lambda: mlp(784, 80, 10),
        optimizer="adam",
        rate=1e-3,
        steps=900,
    ),
    Task(
        name="digits, 20 % wrong labels, SGD",
        data=digits(800, 300, 0.2),
        network=lambda: mlp(64, 96, 96, 10, activation=nn.Tanh),
        optimizer="sgd",
        rate=0.05,
        steps=900,
    ),
    Task(
        name="breast cancer, 100 noise columns, AdamW",
        data=table(datasets.load_breast_cancer, 100, 220, 110),
        network=lambda: mlp(130, 48, 48, 2),
        optimizer="adamw",
        rate=1e-3,
        steps=800,
        batch=32,
    ),
    Task(
        name="diabetes, 40 noise columns, Adam",
        data=table(datasets.load_diabetes, 40, 200, 100, regression=True),
        network=lambda: mlp(50, 80, 40, 1),
        optimizer="adam",
        rate=1e-3,
        steps=700,
        batch=32,
        loss=functional.mse_loss,
        counts=False,
    ),
    Task(
        name="code, LSTM, Adam",
        data=code(LENGTH, 500, 200, 800),
        network=lambda: LSTM(SYMBOLS),
        optimizer="adam",
        rate=5e-3,
        steps=700,
        batch=16,
        schedule="cosine",
    ),
    Task(
        name="code, transformer, AdamW",
        data=code(LENGTH, 500, 200, 800),
        network=lambda: Transformer(SYMBOLS, LENGTH),
        optimizer="adamw",
        rate=3e-3,
        steps=700,
        batch=16,
    ),
)


def _short(steps: int) -> Task:
    """Return a task with right labels, whose training ends before it overfits if it is short."""
    return Task(
        name=f"digits, right labels, {steps} steps of AdamW",
        data=digits(600, 400, 0.0),
        network=lambda: mlp(64, 128, 128, 10),
        optimizer="adamw",
        rate=1e-3,
        steps=steps,
    )


# What a newcomer tries first; not among the tasks that are summed up.
SHORT = (_short(400), _short(1600))


def _few(
    epochs: int, network: Callable[[], nn.Module], optimizer: str, rate: float, *, flat: bool, schedule: str
) -> Task:
    """Return a task with nearly all of Fashion-MNIST, whose training goes through it a few times."""
    return Task(
        name=f"fashion, 54 000 images, {optimizer}, {epochs} epochs",
        data=fashion(54_000, 5000, flat=flat),
        network=network,
        optimizer=optimizer,
        rate=rate,
        steps=420 * epochs,
        batch=128,
        schedule=schedule,
    )


# Neither are these.
FEW = (
    _few(1, cnn, "adamw", 2e-3, flat=False, schedule="cosine"),
    _few(2, lambda: mlp(784, 128, 64, 10), "adamw", 1e-3, flat=True, schedule="constant"),
    _few(3, lambda: mlp(784, 128, 64, 10), "sgd", 0.05, flat=True, schedule="constant"),
)
