"""Spectrum of a differentiable game."""

from __future__ import annotations

from torch import Tensor

from lightning_nested.arguments import checked
from lightning_nested.games.jacobian import JacobianOperator, Losses, PlayersT
from lightning_nested.linalg.eigenvalues import Which, leading_eigenvalues
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.processes import Reduce


@checked
def game_spectrum(
    losses: Losses[PlayersT],
    players: PlayersT,
    k: int | None = None,
    which: Which = "largest_magnitude",
    *,
    player: int | None = None,
    tolerance: float | None = None,
    max_products: int = 2000,
    reduce: Reduce | None = None,
) -> Tensor:
    """Compute eigenvalues of a game's Jacobian: where they lie tells how its players move.

    Positive real parts attract gradient steps, negative ones repel; an imaginary part turns. With ``k`` they come from
    Arnoldi's method on products with Jᵀ, which has the eigenvalues of J; nothing of size n² is ever formed.

    Args:
        losses: Losses of the players, as in :func:`joint_gradient`.
        players: Tensors of the players, as in :func:`joint_gradient`.
        k: Eigenvalues to find; None: all of them, from the dense Jacobian.
        which: The leading ones have the ``"largest_magnitude"``, the ``"largest_imaginary"`` part in absolute value, or
            the ``"smallest_real"`` part.
        player: Index of a player, to take its own block ∂²L_i/∂θ_i² alone; its eigenvalues are real.
        tolerance: Relative accuracy, as in :func:`leading_eigenvalues`.
        max_products: Products at which the search gives up.
        reduce: Averages a tensor over processes: the spectrum is then that of the whole batch, the same everywhere.

    Returns:
        Complex128 on CPU, shape (k,), or (k+1,) where k would split a conjugate pair.

    Raises:
        SpectrumError: No convergence within ``max_products``.
        ValueError: An argument out of range, or a game too large for all or half of its eigenvalues.

    Example:
        >>> import torch
        >>> from lightning_nested.games import DiracGAN
        >>> game_spectrum(DiracGAN().losses, (torch.zeros(1), torch.zeros(1))).imag.round(decimals=12).tolist()
        [0.5, -0.5]
    """
    operator = JacobianOperator(losses, players, reduce=reduce)
    chosen: LinearOperator = operator.T if player is None else operator.block(player)
    found = leading_eigenvalues(chosen, k, which, tolerance=tolerance, max_products=max_products)
    return found.eigenvalues
