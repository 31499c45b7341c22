"""Skips of what torch itself cannot do on this machine, each decided by asking torch."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

T = TypeVar("T")

# What torch says where an operation has no version for a type: oneDNN's words, then those of its own kernels.
MISSING = ("could not create a primitive", "not implemented for 'BFloat16'")

# The lower bound of pyproject.toml lacks some of what later ones have.
TORCH_2_5 = torch.__version__.startswith("2.5.")
named_parameters = pytest.mark.skipif(TORCH_2_5, reason="optimizers of torch 2.5 take no names of parameters")


def bf16_or_skip(compute: Callable[[], T]) -> T:
    """Return `compute()`, which calls torch's own layers in bf16; skip the test where the CPU has no such operation.

    A CPU with AVX2 and no AVX-512, for one, has bf16 products and convolutions, and no LSTM. Any other error is raised.
    """
    try:
        return compute()
    except RuntimeError as error:
        if not any(words in str(error) for words in MISSING):
            raise
        pytest.skip(f"torch cannot do this in bf16 on this CPU: {str(error).splitlines()[0]}")
