"""Steps in C, for ``compiled=True``: compiled once per process by the system's compiler, in some tenths of a second.

``torch.compile`` of the same update was tried first. It guards every tensor of every call, and compiles for tens of
seconds; ``benchmarks/optimizers.py --torch-compile`` measures it beside this.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from lightning_nested.optim.kernels.compiler import build
from lightning_nested.optim.kernels.kernel import DTYPES, Kernel

ALONE = 1 << 17  # elements; fewer take one thread less time than waking the others


@dataclass(frozen=True)
class Native(Kernel):
    """A kernel of ``native.c`` with its scalars.

    Attributes:
        name: ``real_sgd``, ``complex_sgd`` or ``complex_adam``.
        scalars: h, in the order of its signature.
    """

    name: str
    scalars: tuple[float, ...]

    def available(self) -> bool:
        """Compiles when it is first asked."""
        return all(library(dtype) is not None for dtype in DTYPES)

    def _update(self, dtype: torch.dtype, columns: Sequence[Sequence[Tensor]], sizes: list[int]) -> None:
        function = getattr(library(dtype), self.name)
        scalars = (ctypes.c_double * len(self.scalars))(*self.scalars)
        addresses = [[a.data_ptr() for a in column] for column in columns]
        threads = torch.get_num_threads()
        if threads == 1 or sum(sizes) <= ALONE:
            _kernel(function, addresses, sizes, scalars)
            return
        first, *others = _shares(addresses, sizes, dtype.itemsize, threads)
        pool = _pool(threads, os.getpid())
        waiting = [pool.submit(_kernel, function, *share, scalars) for share in others]
        _kernel(function, *first, scalars)
        for future in waiting:
            future.result()


Share = tuple[list[list[int]], list[int]]
"""For each list the addresses of its pieces, and the pieces' numbers of elements."""


def _kernel(
    function: ctypes._NamedFuncPointer,
    addresses: list[list[int]],
    sizes: list[int],
    scalars: ctypes.Array[ctypes.c_double],
) -> None:
    """One call for all pieces; ctypes lets other threads run meanwhile."""
    count = len(sizes)
    table = (ctypes.c_void_p * (count * len(addresses)))(*chain.from_iterable(addresses))
    function(ctypes.c_size_t(count), (ctypes.c_size_t * count)(*sizes), table, scalars)


def _shares(addresses: list[list[int]], sizes: list[int], width: int, threads: int) -> list[Share]:
    """The tensors cut and dealt so that each thread gets as many elements, side by side in memory."""
    whole = -(-sum(sizes) // threads)
    shares: list[Share] = []
    room = 0
    for starts, size in zip(zip(*addresses, strict=True), sizes, strict=True):
        done = 0
        while done < size:
            if room == 0:
                shares.append(([[] for _ in addresses], []))
                room = whole
            part = min(size - done, room)
            for column, start in zip(shares[-1][0], starts, strict=True):
                column.append(start + width * done)
            shares[-1][1].append(part)
            done, room = done + part, room - part
    return shares


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Kept from step to step; ``process``: threads do not survive a fork."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="lightning-nested-step")


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels, compiled when they are first asked for; None where they cannot be, after one warning."""
    return build(__package__, "native.c", dtype, "Steps run without it, more slowly")
