"""Matrices with known inverses, right-hand sides, and matrices of a given condition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DOUBLE = torch.float64
MATRIX = torch.tensor([[5.0, 1.0, 1.0], [1.0, 4.0, 1.0], [1.0, 1.0, 3.0]], dtype=DOUBLE)
INVERSE = torch.tensor([[0.22, -0.04, -0.06], [-0.04, 0.28, -0.08], [-0.06, -0.08, 0.38]], dtype=DOUBLE)
B = (torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE),)


def spd(n: int, condition: float, generator: torch.Generator) -> Tensor:
    """A symmetric matrix with eigenvalues from 1/condition to 1, evenly spaced in the logarithm."""
    q = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE, generator=generator))[0]
    return q @ torch.diag(torch.logspace(0, -math.log10(condition), n, dtype=DOUBLE)) @ q.T
