"""Frames of tangents: orthonormalisation, Krylov subspaces, covariant directions, and their layout in memory.

A frame of k tangents is a matrix Y of shape (..., k, n), one tangent per row: rows are contiguous, so that a
tangent of a large model is a plain flat vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_nested.linalg.finite import check_matrix
from lightning_nested.linalg.vectors import Vector

Product: TypeAlias = Callable[[Tensor], Tensor]  # of an operator with a flat vector (n,)
_TALL = 4096  # from this many coordinates on, two Gram matrices are cheaper than Householder reflections


def to_rows(frame: Vector, *, batch_dims: int = 0) -> Tensor:
    """Join tensors (..., k, *shape) into one matrix (..., k, n)."""
    lead = batch_dims + 1
    return torch.cat([a.reshape(*a.shape[:lead], -1) for a in frame], dim=-1)


def from_rows(rows: Tensor, like: Vector, *, batch_dims: int = 0) -> Vector:
    """Split a matrix (..., k, n) into tensors (..., k, *shape); ``like`` are unbatched or batched coordinates."""
    shapes = [a.shape[batch_dims:] for a in like]
    pieces = torch.split(rows, [math.prod(s) for s in shapes], dim=-1)
    return tuple(p.reshape(*rows.shape[:-1], *s) for p, s in zip(pieces, shapes, strict=True))


def random_frame(
    k: int, n: int, like: Tensor, generator: torch.Generator | None, batch: Sequence[int]
) -> Tensor:
    """Draw orthonormal rows (..., k, n), Haar-distributed, on the CPU so that devices agree."""
    draw = torch.randn(*batch, k, n, generator=generator, dtype=torch.float64)
    return orthonormalize(draw)[0].to(like)


def orthonormalize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factor Y = L Q, with orthonormal rows Q and lower-triangular L of non-negative diagonal.

    Householder QR for short rows. Tall frames (n ≥ 4096) by Cholesky-QR twice, which is two Gram matrices; it squares
    the condition number, so a frame worse conditioned than eps^(-1/4) falls back to Householder.
    Yamamoto et al. (2015), ETNA 44:306-326.

    Args:
        rows: (..., k, n), k ≤ n.

    Returns:
        Q (..., k, n) and L (..., k, k). A row that depends on those before it (beyond rounding) has L_ii = 0, and an
        arbitrary orthonormal direction in Q.

    >>> Q, L = orthonormalize(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
    >>> L.diagonal().tolist()
    [5.0, 3.0]
    """
    if rows.shape[-1] >= _TALL and rows.ndim == 2:
        found = _cholesky_twice(rows) if len(rows) > 1 else _normalized(rows)
        if found is not None:
            return found
    frames, lower = oriented(*(part.unsqueeze(0) for part in unoriented(rows)))
    return frames[0], lower[0]


def unoriented(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factor Y = L Q as :func:`orthonormalize` does, but for the signs of L's diagonal."""
    q, r = torch.linalg.qr(rows.mT)
    return q.mT, r.mT


def oriented(frames: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Make the diagonals non-negative in successive factors, L_t Q_t = J Q_{t−1}, by turning rows of the frames.

    A diagonal below rounding becomes 0: the row depends on those before it.

    Takes and returns (T, ..., k, n) and (T, ..., k, k).
    """
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    turned = torch.where(diagonal < 0, -1.0, 1.0).to(factors.dtype).cumprod(0)
    before = torch.cat([torch.ones_like(turned[:1]), turned[:-1]])
    lower = before.unsqueeze(-1) * factors * turned.unsqueeze(-2)
    # What is left of a row that depends on the others is rounding of its length, which Q does not change.
    rounding = 4 * torch.finfo(factors.dtype).eps * torch.linalg.vector_norm(factors, dim=-1)
    lost = torch.where(diagonal.abs() > rounding, 0.0, diagonal.abs())
    return frames * turned.unsqueeze(-1), lower - torch.diag_embed(lost)


def _normalized(row: Tensor) -> tuple[Tensor, Tensor] | None:
    size = torch.linalg.vector_norm(row, dim=1, keepdim=True)
    return (row / size, size) if float(size) > 0.0 else None


def _cholesky_twice(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factor by Cholesky-QR2; return None where the Gram matrix is too close to singular."""
    eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    q, total = rows, eye
    for sweep in range(2):
        gram = q @ q.mT
        lower, info = torch.linalg.cholesky_ex(gram)
        if int(info) != 0:
            return None
        diagonal = lower.diagonal()
        if sweep == 0 and float(diagonal.min() / diagonal.max()) < torch.finfo(rows.dtype).eps ** 0.25:
            return None
        # One product with a small inverse streams the frame once; a triangular solve does it row by row.
        q = torch.linalg.solve_triangular(lower, eye, upper=False) @ q
        total = total @ lower
    return q, total


def krylov(product: Product, start: Tensor, count: int, *, tolerance: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis (m, n) of a Krylov subspace from ``start`` (n,), and its images, m ≤ ``count``.

    Orthogonalizes fully, and twice, because rounding destroys a Lanczos recurrence. Ends early where what is left of
    an image is below ``tolerance`` times its length: the subspace is invariant.
    """
    basis, images = start.new_zeros(2, count, len(start))
    v, m = start / start.norm(), 0
    while m < count:
        basis[m], images[m] = v, product(v)
        v, length = images[m].clone(), float(images[m].norm())
        m += 1
        for _ in range(2):
            v -= basis[:m].mT @ (basis[:m] @ v)
        rest = v.norm()
        if float(rest) <= tolerance * length + torch.finfo(v.dtype).tiny:
            break
        v = v / rest
    return basis[:m], images[:m]


def symmetric_ritz(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ritz values (m,), ascending, and the rows (m, m) of their coordinates in ``basis``."""
    small = basis @ images.mT
    values, vectors = torch.linalg.eigh(check_matrix((small + small.mT) / 2, "Products in a Krylov space"))
    return values, vectors.mT


def window_weights(window: str, growth: Tensor) -> Tensor:
    """Return weights (T,) of sum 1 for windows (T, ...): equal, or the bump exp(−1/(s(1−s))) over the run."""
    count = len(growth)
    if window == "uniform":
        return torch.full((count,), 1 / count, dtype=growth.dtype, device=growth.device)
    s = (torch.arange(count, dtype=growth.dtype, device=growth.device) + 1) / (count + 1)
    weights = torch.exp(-1 / (s * (1 - s)))
    return weights / weights.sum()


def covariant_directions(frames: Tensor, factors: Tensor, discard: int) -> Tensor:
    """Return covariant Lyapunov vectors: directions that the dynamics maps onto one another, one for each exponent.

    Backward through the triangular factors: C_{t−1} ∝ R_t⁻¹ C_t, and v_t = Q_t C_t. Any upper-triangular start
    converges; the last ``discard`` times are for that. Ginelli et al. (2007), PRL 99:130601.

    Takes Q_t, (T, ..., k, n), and L_t with Y_t = L_t Q_t, (T, ..., k, k); returns unit rows (T − discard, ..., k, n).
    """
    eye = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    c = eye.expand(factors.shape[1:]).clone()
    kept: list[Tensor] = []
    for t in range(len(factors) - 1, -1, -1):
        if t < len(factors) - discard:
            kept.append(c.mT @ frames[t])
        c = torch.linalg.solve_triangular(factors[t].mT, c, upper=True)
        c = c / torch.linalg.vector_norm(c, dim=-2, keepdim=True)
    return torch.stack(kept[::-1])
