"""Rates at which methods contract a game with these eigenvalues: exact for games with a constant Jacobian.

Near a solution the joint gradient is linear, and each eigenvalue λ of its Jacobian evolves on its own. The rate is the
largest modulus of a root of its characteristic polynomial: the distance to the solution is multiplied by it in every
step, below 1 it converges. It counts steps; extragradient takes two gradients in each.

Everything broadcasts: a whole grid of settings costs about a microsecond per setting and eigenvalue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_nested.arguments import at_least, checked, within
from lightning_nested.linalg.finite import check_matrix
from lightning_nested.optim.options import ROUNDED_PI
from lightning_nested.optim.update_rules import Momentum

Eigenvalues: TypeAlias = Tensor | Sequence[complex]
Array: TypeAlias = "NDArray[Any]"

_SHIFT = np.eye(5)


@checked
@overload
def convergence_rate(
    eigenvalues: Eigenvalues, *, lr: float, momentum: float, phase: float = ..., alternating: bool = ...
) -> float: ...
@checked
@overload
def convergence_rate(
    eigenvalues: Eigenvalues,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    phase: float | Tensor = ...,
    alternating: bool = ...,
) -> float | Tensor: ...
@checked
def convergence_rate(
    eigenvalues: Eigenvalues,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    phase: float | Tensor = 0.0,
    alternating: bool = False,
) -> float | Tensor:
    """Compute the worst rate of complex momentum β = |β|e^{iφ} over the eigenvalues, the largest |z| of the roots.

        (z−1)(z² − 2Re β z + |β|²) + αλz(z − Re β) = 0                     (simultaneous)
        [(z−1)(z² − 2Re β z + |β|²) + αpz(z − Re β)]² + α²s²z³(z − Re β)² = 0   (alternating, λ = p ± s·i)

    Simultaneous updates are exact for every game with a constant Jacobian. Alternating ones (each player sees the
    new parameters of those before it) also depend on how the coupling is spread over the players. The eigenvalues
    alone decide in games of two players where a complex pair p ± s·i comes from a coupling of two coordinates of the
    same own curvature p, as in bilinear games and :meth:`QuadraticGame.from_eigenvalues`, and a real one from a
    coordinate without coupling; this is what the formula assumes. :func:`momentum_map` is exact for any game.
    Lorraine, Acuna, Vicol & Duvenaud (2022), AISTATS, PMLR 151:7741-7765.

    Args:
        eigenvalues: λ of the Jacobian, any shape; one of each conjugate pair is enough.
        lr: α > 0.
        momentum: |β| in [0, 1).
        phase: φ in [−π, π].
        alternating: True for players that step one after the other.

    Returns:
        A float; where ``lr``, ``momentum`` or ``phase`` are tensors, float64 of the shape they broadcast to.

    Raises:
        ValueError: No eigenvalues, non-finite ones, or settings out of range.

    Example:
        On the bilinear game xy positive momentum diverges, complex momentum converges.

        >>> [round(convergence_rate([1j], lr=0.1, momentum=0.8, phase=p), 6) for p in (0.0, math.pi / 8)]
        [1.149445, 0.97743]
    """
    values = as_eigenvalues(eigenvalues).reshape(-1)
    alpha, size, angle = _settings(lr, momentum, phase)
    worst = momentum_radii(values, alpha, size, angle, alternating).max(axis=-1)
    return _returned(worst, lr, momentum, phase)


@checked
def eigenvalue_rates(
    eigenvalues: Eigenvalues, *, lr: float, momentum: float, phase: float = 0.0, alternating: bool = False
) -> Tensor:
    """Compute the rate of each eigenvalue, float64 of the shape of ``eigenvalues``: a map of the complex plane.

    Arguments and errors as in :func:`convergence_rate`.
    """
    values = as_eigenvalues(eigenvalues)
    alpha, size, angle = _settings(lr, momentum, phase)
    rates = momentum_radii(values.reshape(-1), alpha, size, angle, alternating)
    return torch.from_numpy(rates.reshape(values.shape))


@checked
def extragradient_rate(eigenvalues: Eigenvalues, *, lr: float | Tensor) -> float | Tensor:
    """Compute the worst |1 − αλ + α²λ²| of w ← w − αξ(w − αξ(w)); a step takes two gradients. √(1−α²+α⁴) on xy.

    >>> round(extragradient_rate([1j], lr=0.5), 6)
    0.901388
    """
    return _worst(lambda x: np.abs(1 - x + x**2), eigenvalues, lr)


@checked
def optimistic_rate(eigenvalues: Eigenvalues, *, lr: float | Tensor) -> float | Tensor:
    """Compute the worst root of z² − (1 − 2αλ)z − αλ of w ← w − 2αξ_t + αξ_{t−1}. √((1+√(1−4α²))/2) on xy, for α ≤ ½.

    Extrapolation from the past has the same rate.

    >>> round(optimistic_rate([1j], lr=0.5), 6)
    0.707107
    """

    def radius(x: Array) -> Array:
        middle = (1 - 2 * x) / 2
        root = np.sqrt(middle**2 + x)
        return np.maximum(np.abs(middle + root), np.abs(middle - root))

    return _worst(radius, eigenvalues, lr)


@checked
def proximal_rate(eigenvalues: Eigenvalues, *, lr: float | Tensor) -> float | Tensor:
    """Compute the worst 1/|1 + αλ| of the implicit step w ← w − αξ(w_new): the ideal that the others approximate.

    >>> round(proximal_rate([1j], lr=1.0), 6)
    0.707107
    """
    return _worst(lambda x: 1 / np.abs(1 + x), eigenvalues, lr)


@checked
def lookahead_rate(
    eigenvalues: Eigenvalues, *, lr: float | Tensor, every_n_updates: int, alpha: float
) -> float | Tensor:
    """Compute the worst |1 − a + a(1 − αλ)ᵏ|^{1/k}, per step, of gradient steps with :class:`Lookahead` of k and a.

    Simultaneous steps; exact for every game with a constant Jacobian. On xy gradient steps alone have √(1 + α²) > 1.

    >>> round(lookahead_rate([1j], lr=0.5, every_n_updates=6, alpha=0.5), 6)
    0.901885
    """
    at_least(1, every_n_updates=every_n_updates)
    within(0, 1, alpha=alpha)

    def radius(x: Array) -> Array:
        return np.abs(1 - alpha + alpha * (1 - x) ** every_n_updates) ** (1 / every_n_updates)

    return _worst(radius, eigenvalues, lr)


@checked
def consensus_rate(eigenvalues: Eigenvalues, *, lr: float, strength: float) -> float | Tensor:
    """Compute the worst |1 − α(λ + γ|λ|²)| of w ← w − α(ξ + γJᵀξ), consensus optimization, with strength γ.

    Exact for a constant normal Jacobian (JᵀJ = JJᵀ), as in bilinear games: √((1 − αγ)² + α²) on xy.

    >>> round(consensus_rate([1j], lr=0.5, strength=1.0), 6)
    0.707107
    """
    at_least(0, strength=strength)
    return _worst(lambda x: np.abs(1 - x - strength / lr * np.abs(x) ** 2), eigenvalues, lr)


def predicted_rate(
    eigenvalues: Eigenvalues, momenta: Sequence[Momentum | None], steps: tuple[int, ...] | None
) -> float | None:
    """Predict the worst rate over eigenvalues of DJ, so at a learning rate of 1.

    It needs one momentum for all players, and one step each; None where there is no prediction. For alternating
    momentum it assumes equal curvatures, see :func:`convergence_rate`; :class:`JointStep` does not.

    >>> round(predicted_rate([0.1j], [Momentum("momentum", 0.8, math.pi / 8)], None), 6)
    0.97743
    """
    momentum = momenta[0]
    if momentum is None or len(set(momenta)) > 1 or momentum.kind == "unknown" or max(steps or (1,)) > 1:
        return None
    if momentum.kind == "momentum":
        beta = {"momentum": momentum.momentum, "phase": momentum.phase}
        return convergence_rate(eigenvalues, lr=1.0, alternating=steps is not None, **beta)
    if steps is not None:
        return None
    rate = extragradient_rate if momentum.kind == "extragradient" else optimistic_rate
    return float(rate(eigenvalues, lr=1.0))


@checked
def momentum_map(
    jacobian: Tensor,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    phase: float | Tensor = 0.0,
    sizes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """Compute the matrix that one update of complex momentum applies to (Re μ, Im μ, w) when the joint gradient is J w.

    μ ← βμ − Jw, w ← w + α Re μ. Its spectral radius is the rate, of any game, simultaneous or alternating, also where
    the players have learning rates and momenta of their own.

    Args:
        jacobian: J, real of shape (n, n).
        lr: α > 0; a tensor of shape (n,) gives each coordinate its own.
        momentum: |β| in [0, 1), a number or of shape (n,).
        phase: φ in [−π, π], a number or of shape (n,).
        sizes: Numbers each player holds, in the order of their steps: alternating updates. None: simultaneous.
        steps: Steps each player takes in its turn; None: one.

    Returns:
        Shape (3n, 3n), in the dtype of ``jacobian``.

    Example:
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        >>> step = momentum_map(turn, lr=0.1, momentum=0.8, phase=math.pi / 8, sizes=(1, 1))
        >>> round(torch.linalg.eigvals(step).abs().max().item(), 6)
        0.94394
    """
    n = jacobian.shape[0]
    if jacobian.shape != (n, n):
        raise ValueError(f"jacobian must be a square matrix. Got shape {tuple(jacobian.shape)}.")
    if steps is not None and sizes is None:
        raise ValueError(
            "steps needs sizes: players take turns. Got sizes=None; give the numbers each holds."
        )
    sizes = (n,) if sizes is None else tuple(sizes)
    if sum(sizes) != n or min(sizes) < 1:
        raise ValueError(f"sizes must be positive and sum to {n}. Got {sizes}.")
    steps = (1,) * len(sizes) if steps is None else tuple(steps)
    if len(steps) != len(sizes) or min(steps) < 1:
        raise ValueError(f"steps must be positive, one for each of {len(sizes)} players. Got {steps}.")
    alpha, size, angle = _settings(lr, momentum, phase)
    if alpha.shape not in ((), (n,)):
        raise ValueError(
            f"lr, momentum and phase must be numbers or of shape {(n,)}. Got shape {alpha.shape}."
        )
    found = momentum_matrix(jacobian.detach().cpu().numpy(), alpha, size, angle, sizes, steps)
    return torch.from_numpy(found).to(jacobian.device)


def momentum_matrix(
    jacobian: Array, lr: Array, momentum: Array, phase: Array, sizes: Sequence[int], steps: Sequence[int]
) -> Array:
    """Compute :func:`momentum_map` without checks."""
    n = len(jacobian)
    alpha, real, imaginary = (
        np.broadcast_to(x, (n,))[:, None].astype(jacobian.dtype)
        for x in (lr, momentum * np.cos(phase), momentum * np.sin(phase))
    )
    whole = np.eye(3 * n, dtype=jacobian.dtype)
    re, im, w = whole.reshape(3, n, 3 * n)  # views
    at = 0
    for size, times in zip(sizes, steps, strict=True):
        own = slice(at, at + size)
        for _ in range(times):  # one player's step, on what those before it left
            mine = real[own] * re[own] - imaginary[own] * im[own] - jacobian[own] @ w
            im[own] = imaginary[own] * re[own] + real[own] * im[own]
            re[own] = mine
            w[own] += alpha[own] * mine
        at += size
    return whole


def momentum_radii(eigenvalues: Array, lr: Array, momentum: Array, phase: Array, alternating: bool) -> Array:
    """Compute the largest |root|, shape (..., k), for k eigenvalues and settings of shape (...), without checks."""
    real, square, lr = (momentum * np.cos(phase))[..., None], (momentum**2)[..., None], lr[..., None]
    if not alternating:
        return _cubic_radius(*_momentum_cubic(lr * eigenvalues, real, square))
    radius = np.empty((*real.shape[:-1], len(eigenvalues)))
    alone = eigenvalues.imag == 0
    if alone.any():
        radius[..., alone] = _cubic_radius(*_momentum_cubic(lr * eigenvalues[alone], real, square))
    if not alone.all():
        radius[..., ~alone] = _alternating_radius(lr * eigenvalues[~alone], real, square)
    return radius


def _momentum_cubic(x: Array, real: Array, square: Array) -> tuple[Array, Array, Array]:
    """Return the coefficients of z², z and 1 of (z−1)(z² − 2Re β z + |β|²) + xz(z − Re β)."""
    return x - 2 * real - 1, square + 2 * real - x * real, -square


def _cubic_radius(b: Array, c: Array, d: Array) -> Array:
    """Compute the largest |root| of z³ + bz² + cz + d by Cardano's formula; the root's sign avoids cancellation."""
    b = b.astype(np.complex128)
    d0 = b * b - 3 * c
    d1 = (2 * b * b - 9 * c) * b + 27 * d
    root = np.sqrt(d1 * d1 - 4 * d0 * d0 * d0)
    root = np.where((d1.conj() * root).real >= 0, root, -root)
    u = ((d1 + root) / 2) ** (1 / 3)
    v = np.divide(d0, u, out=np.zeros_like(u), where=u != 0)  # u = 0: a triple root
    turn = complex(-0.5, math.sqrt(0.75))
    roots = [b + w * u + w.conjugate() * v for w in (1.0, turn, turn.conjugate())]
    radius: Array = np.abs(roots).max(axis=0) / 3
    return radius


def _alternating_radius(x: Array, real: Array, square: Array) -> Array:
    """Compute the largest |root| of the squared cubic of Re x plus (Im x)² z³ (z − Re β)², by companion matrices."""
    b, c, d = _momentum_cubic(x.real, real, square)
    pull = x.imag**2
    companion = np.zeros((*x.shape, 6, 6))
    companion[..., 1:, :5] = _SHIFT
    row = companion[..., 0, :]
    row[..., 0] = -2 * b - pull
    row[..., 1] = 2 * real * pull - b * b - 2 * c
    row[..., 2] = -2 * (d + b * c) - real**2 * pull
    row[..., 3] = -c * c - 2 * b * d
    row[..., 4] = -2 * c * d
    row[..., 5] = -d * d
    radius: Array = np.abs(
        np.linalg.eigvals(check_matrix(companion, "The companion matrix of a momentum step"))
    ).max(axis=-1)
    return radius


def _worst(radius: Callable[[Array], Array], eigenvalues: Eigenvalues, lr: float | Tensor) -> float | Tensor:
    values = as_eigenvalues(eigenvalues).reshape(-1)
    (alpha,) = _settings(lr)
    return _returned(radius(alpha[..., None] * values).max(axis=-1), lr)


def as_eigenvalues(eigenvalues: Eigenvalues) -> Array:
    """Convert eigenvalues to a complex128 array of their shape: at least one, all finite."""
    if isinstance(eigenvalues, Tensor):
        eigenvalues = eigenvalues.detach().cpu().resolve_conj()
    values = np.asarray(eigenvalues, dtype=np.complex128)
    if values.size == 0:
        raise ValueError("eigenvalues must hold at least one eigenvalue. Got none.")
    if not np.isfinite(values).all():
        raise ValueError(f"Eigenvalues must be finite. Got {values[~np.isfinite(values)][0]}.")
    return values


def _settings(lr: float | Tensor, *beta: float | Tensor) -> list[Array]:
    """Convert α and, if given, |β| and φ to float64 arrays of one shape, in range."""
    found = [
        np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64) for x in (lr, *beta)
    ]
    inside = [(found[0] > 0) & np.isfinite(found[0])]
    if beta:
        inside += [(found[1] >= 0) & (found[1] < 1), np.abs(found[2]) <= ROUNDED_PI]
    conditions = ("lr must be positive", "momentum |β| must lie in [0, 1)", "phase must lie in [-π, π]")
    for condition, values, good in zip(conditions, found, inside, strict=False):
        if not good.all():
            raise ValueError(f"{condition}. Got {values[~good].flat[0]:g}.")
    if beta:
        found[2] = found[2].clip(-math.pi, math.pi)
    return list(np.broadcast_arrays(*found))


def _returned(rates: Array, *settings: float | Tensor) -> float | Tensor:
    if any(isinstance(s, Tensor) for s in settings):
        return torch.from_numpy(np.array(rates, dtype=np.float64))
    return float(rates)
