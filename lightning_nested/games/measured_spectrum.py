"""Spectrum of a game at one moment of its training, and the convergence rate that it predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_nested.games.jacobian import JacobianOperator
from lightning_nested.games.joint_step import JointStep, StepJacobian, joint_step, step_matrix
from lightning_nested.games.rates import Array, predicted_rate
from lightning_nested.linalg.eigenvalues import Which, leading_eigenvalues
from lightning_nested.linalg.finite import check_matrix
from lightning_nested.linalg.processes import Reduce
from lightning_nested.linalg.vectors import Vector
from lightning_nested.optim.step_dynamics import StepDynamics
from lightning_nested.optim.update_rules import Momentum


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredSpectrum:
    """Spectrum of a game at one moment of its training: an entry of ``GameSpectrumCallback.history``.

    The learning rates are in the eigenvalues, so :func:`convergence_rate` takes them with ``lr=1.0``.

    Attributes:
        eigenvalues: Eigenvalues of DJ, complex128 of shape (k,), the largest first.
        shares: Share of each player in each eigenvector of √D J √D, which is similar to DJ, shape (k, players), rows
            of sum 1; None where eigenvectors were not computed.
        own: Real eigenvalues of each player's own block D_i ∂²L_i/∂w_i², by player.
        momenta: Momentum |β| and phase of each player when it was measured, before an adaptation by it; None where
            its parameter groups differ.
        steps: Steps of each player in its turn; None: all players step together.
        joint_step: Joint step of all players; None where the game is large, or an update is no momentum.
        rate: Predicted factor of the distance to the solution per game update; None where it cannot be predicted.
        num_products: Products with Jacobians it took.
        game_updates: Complete rounds before it was measured, in a running game.

    Example:
        >>> from lightning_nested.games import Bilinear
        >>> x, y = Bilinear().initial()
        >>> same = StepDynamics(scale=(torch.full((1,), 0.25),), momenta=(Momentum("momentum"),))
        >>> found = measure_spectrum(Bilinear().losses((x, y)), [(x,), (y,)], {"x": same, "y": same})
        >>> found.eigenvalues.tolist(), round(found.rate, 6), found.shares[0].tolist()
        ([0.25j, -0.25j], 1.030776, [0.5, 0.5])
    """

    eigenvalues: Tensor
    shares: Tensor | None
    own: dict[str, Tensor]
    momenta: dict[str, Momentum | None]
    steps: tuple[int, ...] | None
    joint_step: JointStep | None
    rate: float | None
    num_products: int
    game_updates: int = 0

    @property
    def momentum(self) -> Momentum | None:
        """Momentum common to all players; None where they differ."""
        found = set(self.momenta.values())
        return found.pop() if len(found) == 1 else None

    @property
    def alternating(self) -> bool:
        """True if the players take turns."""
        return self.steps is not None

    @property
    def exact(self) -> bool:
        """True if the rate is the spectral radius of the joint step, not a worst case over the eigenvalues measured."""
        return self.joint_step is not None

    @property
    def adapts_each_player(self) -> bool:
        """True if adaptation gives each player its own momentum, by the rate of the joint step."""
        return self.joint_step is not None and self.joint_step.is_small

    @property
    def equal_curvatures(self) -> bool:
        """True if the rate assumes equal own curvatures of coupled coordinates, see :func:`convergence_rate`."""
        return self.alternating and self.rate is not None and not self.exact


def measure_spectrum(
    losses: Sequence[Tensor],
    players: Sequence[Vector],
    dynamics: Mapping[str, StepDynamics],
    *,
    k: int | None = None,
    which: Which = "largest_magnitude",
    steps: tuple[int, ...] | None = None,
    per_player: bool = True,
    max_products: int = 2000,
    reduce: Reduce | None = None,
) -> MeasuredSpectrum:
    """Measure the eigenvalues of DJ: J is the Jacobian of the joint gradient, D the scale of the optimizers' steps.

    Args:
        losses: Losses L_i of the players, scalars with graphs to all players.
        players: Parameters w_i of each player.
        dynamics: Momentum and scale of each player's next step, by its name.
        k: Eigenvalues to find by products; None: all, with the players' shares, from the dense matrix.
        which: The ones that lead, see :func:`game_spectrum`.
        steps: Steps of each player in its turn; None: all players step together.
        per_player: Also measure every player's own block.
        max_products: Products at which each search for eigenvalues gives up.
        reduce: Function that averages a tensor over processes.

    Raises:
        SpectrumError: The eigenvalues did not converge.
        FloatingPointError: A loss or a product is not finite.
    """
    descended = [loss * each.sign for loss, each in zip(losses, dynamics.values(), strict=True)]
    jacobian = JacobianOperator(descended, tuple(players), reduce=reduce)
    scale = tuple(d for each in dynamics.values() for d in each.scale)
    blocks = {
        name: (StepJacobian(jacobian.block(i), each.scale), jacobian.sizes[i])
        for i, (name, each) in enumerate(dynamics.items() if per_player else ())
    }
    step = joint_step(jacobian, list(dynamics.values()), steps)
    if k is None:
        matrix = step_matrix(jacobian, scale) if step is None else step.matrix
        (eigenvalues, shares), products = _all_eigenvalues(matrix, jacobian.sizes), jacobian.size
    else:
        operator, count = StepJacobian(jacobian.T, scale), min(k, jacobian.size)
        found = leading_eigenvalues(operator, count, which, max_products=max_products)
        eigenvalues, shares = found.eigenvalues, None
        products = found.num_products + (0 if step is None else jacobian.size)
    own = {
        name: leading_eigenvalues(block, k and min(k, size), max_products=max_products)
        for name, (block, size) in blocks.items()
    }
    momenta = {name: each.momentum for name, each in dynamics.items()}
    return MeasuredSpectrum(
        eigenvalues=eigenvalues,
        shares=shares,
        own={name: found.eigenvalues.real for name, found in own.items()},
        momenta=momenta,
        steps=steps,
        joint_step=step,
        rate=predicted_rate(eigenvalues, list(momenta.values()), steps) if step is None else step.rate(),
        num_products=products + sum(found.num_products for found in own.values()),
    )


def _all_eigenvalues(matrix: Array, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues, the largest first, and the players' shares of each."""
    values, vectors = np.linalg.eig(check_matrix(matrix, "The matrix of the joint step"))
    mass = np.add.reduceat(np.abs(vectors) ** 2, np.cumsum((0, *sizes[:-1])), axis=0).T
    order = np.argsort(-np.abs(values), kind="stable")
    shares = (mass / mass.sum(axis=1, keepdims=True))[order]
    return torch.from_numpy(values.astype(np.complex128)[order]), torch.from_numpy(shares)
