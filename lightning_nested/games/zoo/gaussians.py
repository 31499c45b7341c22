"""Generative adversarial network on a ring of Gaussians, as a game of two flat tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.games.zoo.game import Game
from lightning_nested.games.zoo.modes import ring


@checked
class GaussiansGAN(Game):
    """Game of a generator and a discriminator, small tanh networks, with a ring of Gaussians as data.

    The losses are the usual ones, with D the discriminator's logit on real data x and samples G(z):
    L_D = mean log(1+e^{−D(x)}) + mean log(1+e^{D(G(z))}) and L_G = mean log(1+e^{−D(G(z))}) (not saturating), or
    −mean log(1+e^{D(G(z))}) (minimax: then L_G + L_D does not depend on z).

    ``losses`` is a function of the players alone: it uses one batch until ``resample`` draws the next, so that
    derivatives, spectra and Lyapunov exponents see one game. The players are (discriminator, generator).

    Args:
        hidden: Widths of the hidden layers of both networks.
        noise_dim: Width of z.
        batch_size: Samples and real points in a batch.
        num_modes: Gaussians on the ring.
        radius: Radius of the ring.
        std: Standard deviation of each Gaussian.
        saturating: Use the minimax loss for the generator.
        generator: Draws the first batch; None: a fixed seed.

    Raises:
        ValueError: A size below 1 or a length that is not positive.

    Example:
        >>> game = GaussiansGAN(hidden=(8,), noise_dim=2)
        >>> players = game.initial(torch.Generator().manual_seed(0))
        >>> game.sizes, tuple(game.samples(players, 5).shape)
        ((33, 42), (5, 2))
    """

    names = ("discriminator", "generator")

    def __init__(
        self,
        hidden: Sequence[int] = (32, 32),
        *,
        noise_dim: int = 16,
        batch_size: int = 128,
        num_modes: int = 8,
        radius: float = 2.0,
        std: float = 0.02,
        saturating: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        at_least(1, noise_dim=noise_dim, batch_size=batch_size, hidden=hidden)
        positive(std=std)
        self.centres, self.std, self.saturating = ring(num_modes, radius), std, saturating
        self.noise_dim, self.batch_size = noise_dim, batch_size
        self._widths = ((2, *hidden, 1), (noise_dim, *hidden, 2))
        self.sizes = tuple(sum((i + 1) * o for i, o in pairwise(widths)) for widths in self._widths)
        self.resample(generator if generator is not None else torch.Generator().manual_seed(0))

    def initial(
        self, generator: torch.Generator | None = None, *, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, ...]:
        """Draw weights from N(0, 1/fan-in), biases 0."""
        players = []
        for widths in self._widths:
            parts = []
            for i, o in pairwise(widths):
                weight = torch.randn(o * i, generator=generator, dtype=dtype) / math.sqrt(i)
                parts += [weight, torch.zeros(o, dtype=dtype)]
            players.append(torch.cat(parts).requires_grad_(True))
        return tuple(players)

    def resample(self, generator: torch.Generator | None = None) -> None:
        """Draw the batch that the losses use from now on."""
        self.noise = torch.randn(self.batch_size, self.noise_dim, generator=generator, dtype=torch.float64)
        self.real = self.data(self.batch_size, generator)

    def data(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw real points, float64 of shape (count, 2)."""
        mode = torch.randint(len(self.centres), (count,), generator=generator)
        return self.centres[mode] + self.std * torch.randn(count, 2, generator=generator, dtype=torch.float64)

    def samples(
        self, players: tuple[Tensor, ...], count: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw points of the generator network, shape (count, 2), without a graph."""
        _, weights = self._unpack(players)
        noise = torch.randn(count, self.noise_dim, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            return _network(weights, self._widths[1], noise.to(weights))

    def logits(self, players: tuple[Tensor, ...], points: Tensor) -> Tensor:
        """Return the discriminator's logits, positive for what it takes for real, shape (count,)."""
        return _network(self._unpack(players)[0], self._widths[0], points.to(players[0])).squeeze(1)

    def losses(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute the losses on the current batch."""
        weights = self._unpack(players)[1]
        fake = self.logits(players, _network(weights, self._widths[1], self.noise.to(weights)))
        told_apart = functional.softplus(fake).mean()
        discriminator = functional.softplus(-self.logits(players, self.real)).mean() + told_apart
        return discriminator, -told_apart if self.saturating else functional.softplus(-fake).mean()


def _network(flat: Tensor, widths: Sequence[int], x: Tensor) -> Tensor:
    """Evaluate the tanh network whose weights and biases lie one after the other in ``flat``."""
    at = 0
    for layer, (i, o) in enumerate(pairwise(widths)):
        weight, bias = flat[at : at + i * o].view(o, i), flat[at + i * o : at + (i + 1) * o]
        x = functional.linear(x, weight, bias)
        at += (i + 1) * o
        if layer < len(widths) - 2:
            x = torch.tanh(x)
    return x
