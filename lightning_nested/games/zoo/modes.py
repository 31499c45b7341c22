"""Modes of a mixture that samples cover, and the share of good samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_nested.arguments import at_least, checked, positive


@checked
def ring(num_modes: int = 8, radius: float = 2.0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return centres at equal distances on a circle, shape (num_modes, 2), the first on the positive x axis.

    >>> ring(4, 1.0).round(decimals=6).abs().tolist()
    [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """
    at_least(1, num_modes=num_modes)
    positive(radius=radius)
    angle = torch.arange(num_modes, dtype=dtype) * (2 * math.pi / num_modes)
    return radius * torch.stack([angle.cos(), angle.sin()], dim=1)


@checked
def high_quality(samples: Tensor, centres: Tensor, std: float, *, within: float = 3.0) -> Tensor:
    """Return the share of samples within ``within`` standard deviations of a centre, 0-dimensional in [0, 1].

    For a mixture of Gaussians in the plane itself it is 1 − e^{−9/2} = 0.9889 or more.

    Args:
        samples: Shape (n, d).
        centres: Shape (m, d).
        std: Standard deviation of a mode.
        within: Distance in standard deviations.

    >>> high_quality(torch.tensor([[2.0, 0.05], [0.0, 0.0]]), ring(dtype=torch.float32), 0.02).item()
    0.5
    """
    distance, _ = _nearest(samples, centres)
    positive(std=std, within=within)
    return (distance <= within * std).to(torch.float64).mean()


@checked
def modes_covered(
    samples: Tensor, centres: Tensor, std: float, *, within: float = 3.0, at_least: int = 1
) -> int:
    """Count the modes with at least ``at_least`` high-quality samples.

    As is usual (Metz et al. 2017, arXiv 1611.02163; Srivastava et al. 2017, arXiv 1705.07761) a sample counts for the
    nearest mode, and only within three standard deviations of it. The count grows with the number of samples; state
    it (2 500 is usual).

    Args:
        samples: Shape (n, d).
        centres: Shape (m, d).
        std: Standard deviation of a mode.
        within: Distance in standard deviations.
        at_least: Samples that make a mode covered.

    >>> modes_covered(ring()[:5], ring(), 0.02)
    5
    """
    distance, mode = _nearest(samples, centres)
    positive(std=std, within=within, at_least=at_least)
    hits = torch.bincount(mode[distance <= within * std], minlength=len(centres))
    return int((hits >= at_least).sum())


def _nearest(samples: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance to the nearest centre and its index; a sample that is not finite is infinitely far away."""
    if samples.ndim != 2 or centres.ndim != 2 or samples.shape[1] != centres.shape[1]:
        raise ValueError(
            "samples and centres must have shapes (n, d) and (m, d). "
            f"Got {tuple(samples.shape)} and {tuple(centres.shape)}."
        )
    if len(samples) == 0:
        raise ValueError("There must be at least one sample. Got an empty tensor.")
    distance, mode = torch.cdist(samples.detach(), centres.to(samples)).min(dim=1)
    return distance.nan_to_num(nan=math.inf), mode
