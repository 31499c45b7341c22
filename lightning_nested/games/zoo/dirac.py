"""Dirac-GAN, the smallest GAN: a point that learns to sit where the data are."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lightning_nested.arguments import checked
from lightning_nested.games.zoo.game import Game


@checked
class DiracGAN(Game):
    """A generator that places one point θ, a linear discriminator D(x) = ψx, and data that are all at 0.

        L_D = −f(0) − f(−ψθ) + ½r ψ²,   L_G = f(−ψθ),   f(t) = −log(1 + e⁻ᵗ)

    The players are (ψ, θ). At the solution 0 the Jacobian is [[r, ½], [−½, 0]] with the eigenvalues
    r/2 ± √(r² − 1)/2: without a penalty ± i/2, so that gradient steps never arrive.
    Mescheder, Geiger & Nowozin (2018), ICML, PMLR 80:3481-3490.

    Args:
        penalty: r, the weight of the gradient penalty on the data.

    Raises:
        ValueError: A negative penalty.

    Example:
        >>> DiracGAN().eigenvalues().tolist()
        [0.5j, -0.5j]
    """

    names = ("discriminator", "generator")

    def __init__(self, penalty: float = 0.0) -> None:
        if not (penalty >= 0 and math.isfinite(penalty)):
            raise ValueError(f"penalty must be non-negative. Got {penalty}.")
        self.penalty = penalty

    def losses(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute the minimax losses: the generator gains what the discriminator loses on its point."""
        psi, theta = self._unpack(players)
        fooled = functional.logsigmoid(-psi * theta).sum()
        real = math.log(2.0)  # −f(0): the data are at 0 and the discriminator has no bias
        return real - fooled + 0.5 * self.penalty * (psi**2).sum(), fooled

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues of the Jacobian at the solution, complex128 of shape (2,)."""
        root = torch.sqrt(torch.tensor(self.penalty**2 - 1, dtype=torch.complex128)) / 2
        return torch.stack([self.penalty / 2 + root, self.penalty / 2 - root])
