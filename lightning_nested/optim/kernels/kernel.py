"""Updates that go through memory themselves, and which tensors such a kernel can take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

DTYPES = (torch.float32, torch.float64)
_PLAIN = {Parameter, Tensor}  # a subclass (DTensor, ...) may have no memory of its own


class Kernel(ABC):
    """An update in place of contiguous float32 and float64 tensors on CPU, which trusts what it is given."""

    def run(self, lists: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        """Update what the kernel can take.

        Args:
            lists: Parameters first; equal lengths, and equal shapes at the same place.

        Returns:
            The lists of what is left.
        """
        if not self.available():
            return lists
        dtypes = [w.dtype for w in lists[0]]
        sizes = [w.numel() for w in lists[0]]
        if len(set(dtypes)) == 1 and all(_fits(column, dtypes[0], sizes) for column in lists):
            self._change(dtypes[0], lists, sizes)  # the usual case
            return ()
        taken = [
            all(_fits((a,), dtype, [size]) for a in row)
            for dtype, size, *row in zip(dtypes, sizes, *lists, strict=True)
        ]
        for dtype in DTYPES:
            places = [i for i, takes in enumerate(taken) if takes and dtypes[i] == dtype]
            if places:
                columns = [[column[i] for i in places] for column in lists]
                self._change(dtype, columns, [sizes[i] for i in places])
        return [[a for a, takes in zip(column, taken, strict=True) if not takes] for column in lists]

    def _change(self, dtype: torch.dtype, columns: Sequence[Sequence[Tensor]], sizes: list[int]) -> None:
        self._update(dtype, columns, sizes)
        for w in columns[0]:
            increment_version(w)  # autograd must learn that its saved parameters have changed

    def available(self) -> bool:
        """Whether there is such a kernel here."""
        return True

    @abstractmethod
    def _update(self, dtype: torch.dtype, columns: Sequence[Sequence[Tensor]], sizes: list[int]) -> None:
        """Update tensors that fit, all of one dtype."""


def _fits(column: Sequence[Tensor], dtype: torch.dtype, sizes: list[int]) -> bool:
    """Every tensor is what a kernel expects; ``map`` over C functions, as a step of small tensors is all calls."""
    return (
        dtype in DTYPES
        and set(map(type, column)) <= _PLAIN
        and set(map(attrgetter("dtype"), column)) == {dtype}
        and all(map(attrgetter("is_cpu"), column))
        and list(map(Tensor.numel, column)) == sizes
        and all(map(Tensor.is_contiguous, column))
        and not any(map(Tensor.is_neg, column))
    )
