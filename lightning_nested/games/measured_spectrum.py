"""Spectrum of a game, measured at one moment of its training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_nested.optim.update_rules import Momentum


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredSpectrum:
    """The spectrum of a game at one moment of its training.

    Attributes:
        game_updates: When.
        eigenvalues: Of DJ, complex128 of shape (k,), the largest first.
        shares: How much of each eigenvector of √D J √D, which is similar, belongs to each player, shape
            (k, players), rows of sum 1; None where eigenvectors were not computed.
        own: Real eigenvalues of each player's own block D_i ∂²L_i/∂w_i², by player.
        momenta: Of each player; None where its parameter groups differ.
        alternating: Whether the players step one after the other.
        rate: Predicted factor of the distance to the solution per game update; None where it cannot be predicted.
        exact: Whether the rate is the spectral radius of the players' joint step, and no worst case of a formula over
            the eigenvalues measured.
        num_products: Products with Jacobians it took.
        equal_curvatures: Whether the rate assumes that coupled coordinates have the same own curvature, as
            :func:`lightning_nested.games.convergence_rate` does for alternating players.
    """

    game_updates: int
    eigenvalues: Tensor
    shares: Tensor | None
    own: dict[str, Tensor]
    momenta: dict[str, Momentum | None]
    alternating: bool
    rate: float | None
    num_products: int
    exact: bool = False
    equal_curvatures: bool = False

    @property
    def momentum(self) -> Momentum | None:
        """Common to all players; None where they differ."""
        found = set(self.momenta.values())
        return found.pop() if len(found) == 1 else None
