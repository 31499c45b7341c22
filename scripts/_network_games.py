"""Games between small networks, many seeds at once: a ring of Gaussians, digits, adversarial training.

The networks of a seed are one slice of stacked weights and a loss is a sum over seeds. Optimizers that act on every
number alone then train each seed as if it were by itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.callbacks.generative_metrics.real_statistics import RealStatistics
from lightning_nested.callbacks.generative_metrics.scores import frechet_distance
from lightning_nested.datamodules import DigitsDataModule
from lightning_nested.games import high_quality, modes_covered
from lightning_nested.games.zoo.modes import ring
from lightning_nested.networks.adversarial import AdversarialLoss, NonSaturating


class StackedMLP(nn.Module):
    """Network for each seed, as slices of stacked weights; initialized as ``nn.Linear``, by the seed alone."""

    def __init__(
        self,
        seeds: Sequence[int],
        widths: Sequence[int],
        stream: int,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        draws = [torch.Generator().manual_seed(1_000_003 * seed + stream) for seed in seeds]
        for i, o in pairwise(widths):
            bound = 1 / math.sqrt(i)
            both = torch.stack([torch.rand(i + 1, o, generator=g) for g in draws]) * 2 * bound - bound
            self.weights.append(nn.Parameter(both[:, :-1].clone()))
            self.biases.append(nn.Parameter(both[:, -1:].clone()))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, seeds, in) to (n, seeds, out)."""
        x = x.transpose(0, 1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if layer < len(self.weights) - 1:
                x = self.activation(x)
        return x.transpose(0, 1)


class NetworkGame(ABC):
    """Two players with stacked weights.

    Attributes:
        players: Parameters of each, in the order of their steps.
        fresh_batches: True: each player's step has a batch of its own; False: one batch for the steps of all.
    """

    players: dict[str, list[nn.Parameter]]
    fresh_batches = True

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        # One stream for each seed: what a seed sees does not depend on the others.
        self.streams = [torch.Generator().manual_seed(7_919 * seed + 5) for seed in seeds]

    def normal(self, count: int, size: int) -> Tensor:
        """Draw (count, seeds, size), each seed from its own stream."""
        return torch.stack([torch.randn(count, size, generator=g) for g in self.streams], dim=1)

    def choice(self, count: int, of: int) -> Tensor:
        """Draw whole numbers below ``of``, (count, seeds)."""
        return torch.stack([torch.randint(of, (count,), generator=g) for g in self.streams], dim=1)

    @abstractmethod
    def resample(self) -> None:
        """Draw the batch of the next losses."""

    @abstractmethod
    def loss(self, player: str) -> Tensor:
        """Return the sum over seeds of the player's loss on the batch."""

    def project(self) -> None:  # noqa: B027 - most have nothing to do
        """Bring the players back to where they may be, after a step."""

    @abstractmethod
    def scores(self) -> list[float]:
        """Return a score for each seed."""


class StackedGAN(NetworkGame):
    """Generator against discriminator.

    Args:
        seeds: One game for each.
        generator: Widths from the latents to the data.
        hidden: Widths of the discriminator's hidden layers.
        batch_size: Real and generated points in a batch.
        loss: Loss of both; nothing is added to it.
        activation: Of both networks.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        generator: Sequence[int],
        hidden: Sequence[int],
        batch_size: int,
        loss: AdversarialLoss,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
    ) -> None:
        super().__init__(seeds)
        self.generator = StackedMLP(seeds, generator, 1, activation)
        self.discriminator = StackedMLP(seeds, [generator[-1], *hidden, 1], 2, activation)
        self.players = {n: list(getattr(self, n).parameters()) for n in ("discriminator", "generator")}
        self.latent_dim, self.batch_size = generator[0], batch_size
        self.adversarial = loss

    def resample(self) -> None:
        """Draw latents and real points."""
        self.latents, self.real = self.normal(self.batch_size, self.latent_dim), self.data(self.batch_size)

    @abstractmethod
    def data(self, count: int) -> Tensor:
        """Draw real points, (count, seeds, size)."""

    def score_of(self, x: Tensor) -> Tensor:
        """Return the discriminator's logits, (n, seeds)."""
        logits: Tensor = self.discriminator(x).squeeze(-1)
        return logits

    def loss(self, player: str) -> Tensor:
        """Return the adversarial loss."""
        fake = self.generator(self.latents)
        if player == "generator":
            return len(self.seeds) * self.adversarial.generator_beside(
                self.score_of(self.real), self.score_of(fake)
            )
        return len(self.seeds) * self.adversarial.discriminator(
            self.score_of(self.real), self.score_of(fake.detach())
        )

    @torch.no_grad()
    def samples(self, count: int) -> Tensor:
        """Return samples (count, seeds, size) from latents that are the same at every call."""
        draws = [torch.Generator().manual_seed(31 * seed + 11) for seed in self.seeds]
        z = torch.stack([torch.randn(count, self.latent_dim, generator=g) for g in draws], dim=1)
        made: Tensor = self.generator(z)
        return made


class Ring(StackedGAN):
    """Eight Gaussians on a ring. Score: share of good samples times share of modes covered."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(
            seeds, generator=(2, 64, 64, 2), hidden=(64, 64), batch_size=64, loss=NonSaturating()
        )
        self.centres, self.std = ring(8, 2.0).float(), 0.05

    def data(self, count: int) -> Tensor:
        """Draw a mode and a point around it."""
        return self.centres[self.choice(count, 8)] + self.std * self.normal(count, 2)

    def scores(self) -> list[float]:
        """Look at 2 500 samples of each seed."""
        found = self.samples(2500)
        columns = [found[:, s] for s in range(len(self.seeds))]
        return [
            float(high_quality(x, self.centres, self.std))
            * modes_covered(x, self.centres, self.std, at_least=20)
            / 8
            for x in columns
        ]


@cache
def digits(seed: int = 0) -> DigitsDataModule:
    """Return the digits, split by a seed."""
    data = DigitsDataModule(train_size=1000, val_size=297, seed=seed)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


class Digits(StackedGAN):
    """8×8 digits. Score: Fréchet distance of 20 principal components between 1 797 samples and the 1 797 images."""

    def __init__(self, seeds: Sequence[int], loss: AdversarialLoss) -> None:
        super().__init__(
            seeds,
            generator=(16, 64, 64, 64),
            hidden=(64, 64),
            batch_size=32,
            loss=loss,
            activation=lambda x: functional.leaky_relu(x, 0.2),
        )
        source = digits()
        parts = [source.train_images, source.val_images, source.test_images]
        self.images = torch.cat(parts).flatten(1) * 2 - 1
        self.components = torch.linalg.svd(self.images - self.images.mean(0), full_matrices=False)[2][:20].T

    def data(self, count: int) -> Tensor:
        """Draw images."""
        return self.images[self.choice(count, len(self.images))]

    def scores(self) -> list[float]:
        """Return the distance of each seed."""
        found, real = self.samples(len(self.images)) @ self.components, self.images @ self.components
        return [frechet(real.double(), found[:, s].double()) for s in range(len(self.seeds))]


def frechet(real: Tensor, fake: Tensor) -> float:
    """Return the Fréchet distance of two samples (n, p), infinite if one of the fakes is not finite."""
    if not bool(fake.isfinite().all()):
        return math.inf
    sums = RealStatistics(
        count=len(real), total=real.sum(0), products=real.T @ real, features=real, accuracy=math.nan
    )
    return frechet_distance(sums, fake)


class AdversarialTraining(NetworkGame):
    """A classifier of digits against a perturbation of every training image, each pixel by at most ``radius``.

    Score: accuracy on held-out images under 20 signed gradient steps.
    """

    radius = 0.2  # pixels lie in [0, 1]

    def __init__(self, seeds: Sequence[int], *, images: int = 300) -> None:
        super().__init__(seeds)
        self.network = StackedMLP(seeds, [64, 64, 10], 1, torch.relu)
        sources = [digits(seed) for seed in seeds]

        def stacked(parts: list[Tensor]) -> Tensor:
            return torch.stack([part[:images] for part in parts], dim=1)

        self.x = stacked([s.train_images.flatten(1) for s in sources])
        self.y = stacked([s.train_labels for s in sources])
        self.held = stacked([s.test_images.flatten(1) for s in sources])
        self.held_y = stacked([s.test_labels for s in sources])
        self.moved = nn.Parameter(torch.zeros_like(self.x))
        self.players = {"perturbation": [self.moved], "network": list(self.network.parameters())}

    def resample(self) -> None:
        """Do nothing: a batch is all images."""

    def loss(self, player: str) -> Tensor:
        """Return the cross-entropy; the perturbation's is the negative one, a sum over its images."""
        both = self._losses(self.x + self.moved, self.y)
        return both.mean(0).sum() if player == "network" else -both.sum()

    def _losses(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.network(x)
        return functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)

    @torch.no_grad()
    def project(self) -> None:
        """Keep every pixel within the radius."""
        self.moved.clamp_(-self.radius, self.radius)

    def scores(self) -> list[float]:
        """Attack the held-out images."""
        moved = torch.zeros_like(self.held, requires_grad=True)
        for _ in range(20):
            (gradient,) = torch.autograd.grad(self._losses(self.held + moved, self.held_y).sum(), moved)
            with torch.no_grad():
                moved += 0.1 * self.radius * gradient.sign()
                moved.clamp_(-self.radius, self.radius)
        with torch.no_grad():
            right = self.network(self.held + moved).argmax(-1) == self.held_y
        return [float(v) for v in right.float().mean(0)]


def train(game: NetworkGame, make: Callable[[Any], torch.optim.Optimizer], gradients: int) -> list[float]:
    """Let the players step in turns until ``gradients`` joint gradients are taken; return the scores."""
    from lightning_nested.optim import Extragradient

    optimizers = {name: make(params) for name, params in game.players.items()}
    if all(isinstance(o, Extragradient) for o in optimizers.values()):
        for _ in range(gradients // 2):
            game.resample()
            _differentiate(game, *game.players)
            for optimizer in optimizers.values():
                optimizer.extrapolate()  # type: ignore[attr-defined]
            _differentiate(game, *game.players)
            for optimizer in optimizers.values():
                optimizer.step()
            game.project()
        return game.scores()
    for _ in range(gradients):
        step(game, optimizers)
    return game.scores()


def step(game: NetworkGame, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Let each player step once, in turn."""
    for turn, (name, optimizer) in enumerate(optimizers.items()):
        if turn == 0 or game.fresh_batches:
            game.resample()
        _differentiate(game, name)
        optimizer.step()
        game.project()


def _differentiate(game: NetworkGame, *players: str) -> None:
    """Set the gradients of some players."""
    for name in players:
        params = game.players[name]
        gradients = torch.autograd.grad(game.loss(name), params)
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
