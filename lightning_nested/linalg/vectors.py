"""Arithmetic on tuples of tensors, the vectors of every solver; in shards, see :mod:`lightning_nested.linalg.shards`.

On CPU a loop over tensors keeps each one in cache; on accelerators one ``_foreach`` kernel saves launches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_nested.linalg.shards import added_up, in_shards, parts

Vector: TypeAlias = tuple[Tensor, ...]


def _fused(vector: Sequence[Tensor]) -> bool:
    return len(vector) > 1 and vector[0].device.type != "cpu"


def dot(u: Vector, v: Vector) -> Tensor:
    """Inner product Σᵢ uᵢ·vᵢ as a 0-dimensional tensor, on the device of the vectors."""
    products = [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(parts(u), parts(v), strict=True)]
    return added_up(torch.stack(products).sum(), u)


def double_dot(u: Vector, v: Vector) -> Tensor:
    """Inner product in double precision, 0-dimensional: for a small difference of large sums.

    >>> big = (torch.tensor([1e8, 1.0, -1e8]),)
    >>> float(double_dot(big, (torch.ones(3),)))
    1.0
    """
    # Apple's GPUs have no double precision.
    wide = torch.float32 if u[0].device.type == "mps" else torch.float64
    pairs: Iterable[tuple[Tensor, Tensor]] = zip(parts(u), parts(v), strict=True)
    if u[0].device.type == "cpu":
        # Pieces that stay in cache when they are converted.
        pieces = ((torch.split(a.reshape(-1), _PIECE), torch.split(b.reshape(-1), _PIECE)) for a, b in pairs)
        pairs = (pair for piece in pieces for pair in zip(*piece, strict=True))
    flat = [torch.dot(a.reshape(-1).to(wide), b.reshape(-1).to(wide)) for a, b in pairs]
    return added_up(torch.stack(flat).sum(), u)


_PIECE = 1 << 15


def norm(v: Vector) -> Tensor:
    """Euclidean norm ‖v‖₂ over all tensors, 0-dimensional."""
    size: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(a) for a in parts(v)]))
    return added_up(size.square(), v).sqrt() if in_shards(v) else size


def clone(v: Iterable[Tensor]) -> Vector:
    """Return detached copies, contiguous so that a flat view costs nothing."""
    return tuple(a.detach().clone(memory_format=torch.contiguous_format) for a in v)


def zeros_like(v: Iterable[Tensor]) -> Vector:
    """Return zeros of the same shapes, dtypes and devices."""
    return tuple(torch.zeros_like(a, memory_format=torch.contiguous_format) for a in v)


def zeros_where_none(v: Sequence[Tensor | None], like: Sequence[Tensor]) -> Vector:
    """Replace each None, autograd's gradient of an unused tensor, by zeros shaped as in ``like``."""
    return tuple(torch.zeros_like(p) if a is None else a for a, p in zip(v, like, strict=True))


def add_(u: Vector, v: Vector, alpha: float = 1.0) -> Vector:
    """u ← u + αv in place; returns u."""
    own, other = parts(u), parts(v)
    if _fused(own):
        torch._foreach_add_(list(own), list(other), alpha=alpha)
    else:
        for a, b in zip(own, other, strict=True):
            a.add_(b, alpha=alpha)
    return u


def added(u: Vector, v: Vector, alpha: float = 1.0) -> Vector:
    """Return u + αv in tensors of its own, without a graph."""
    return tuple(a.detach().add(b.detach(), alpha=alpha) for a, b in zip(u, v, strict=True))


def scale_(u: Vector, alpha: float) -> Vector:
    """u ← αu in place; returns u."""
    own = parts(u)
    if _fused(own):
        torch._foreach_mul_(list(own), alpha)
    else:
        for a in own:
            a.mul_(alpha)
    return u


def follow_(u: Vector, alpha: float, v: Vector) -> Vector:
    """u ← αu + v in place, in one pass over memory; returns u.

    >>> follow_((torch.tensor([1.0, 2.0]),), 10.0, (torch.tensor([3.0, 4.0]),))
    (tensor([13., 24.]),)
    """
    if _fused(u):
        return add_(scale_(u, alpha), v)
    for a, b in zip(parts(u), parts(v), strict=True):
        own = a.detach()
        torch.add(b.detach(), own, alpha=alpha, out=own)
    return u


def slope_(u: Vector, v: Vector, factor: float) -> Vector:
    """u ← (u − v)·factor in place; returns u."""
    if _fused(u):
        return scale_(add_(u, v, alpha=-1.0), factor)
    for a, b in zip(parts(u), parts(v), strict=True):
        a.sub_(b).mul_(factor)
    return u


def flatten(v: Iterable[Tensor]) -> Tensor:
    """Return one flat tensor of shape (n,) holding a copy of all entries."""
    return torch.cat([a.reshape(-1) for a in v])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> Vector:
    """Return views into ``flat`` with the shapes of ``like``; copies where ``like`` has another dtype."""
    pieces = torch.split(flat, [a.numel() for a in like])
    return tuple(p.view(a.shape).to(a.dtype) for p, a in zip(pieces, like, strict=True))
