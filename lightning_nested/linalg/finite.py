"""Guards against numbers that are not finite, before a branch depends on one or LAPACK receives it."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = TypeVar("Matrix", Tensor, NDArray[Any])


def check_finite(value: float, what: str) -> float:
    """Return the value, or raise FloatingPointError if it is not finite."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{what} must be finite. Got {value}: the loss or its derivatives overflowed; lower the learning rates, "
            "add damping, or train in a wider precision."
        )
    return value


def check_matrix(matrix: Matrix, what: str) -> Matrix:
    """Return a matrix that a LAPACK routine may receive: with others it fails in its own way, or never returns.

    Raises:
        FloatingPointError: An entry is not finite.

    >>> check_matrix(torch.tensor([[1.0, float("inf")]]), "The core")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FloatingPointError: The core must be finite. Got 1 of 2 entries that are not: ...
    """
    finite = torch.isfinite(matrix) if isinstance(matrix, Tensor) else np.isfinite(matrix)
    if not bool(finite.all()):
        lost, size = int((~finite).sum()), math.prod(finite.shape)
        raise FloatingPointError(
            f"{what} must be finite. Got {lost} of {size} entries that are not: the loss or its derivatives "
            "overflowed; lower the learning rates, add damping, or train in a wider precision."
        )
    return matrix
