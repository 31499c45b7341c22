"""Operators that the user brings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nested.linalg.operators import as_operator
from tests.cases import DOUBLE


def test_products_of_given_operators_are_checked() -> None:
    class Wrong:
        def __init__(self, product: Any) -> None:
            self.product = product

        def __matmul__(self, v: Tensor) -> Any:
            return self.product

    like = (torch.ones(3, dtype=DOUBLE),)
    for product, message in (
        (torch.ones(2), r"Got shape \(2,\)"),
        (None, "Got NoneType"),
        (torch.ones(3), "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            as_operator(Wrong(product), like) @ like
