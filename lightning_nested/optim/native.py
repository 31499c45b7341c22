"""Steps in C, for ``compiled=True``: compiled once per process by the system's compiler, in about half a second.

``torch.compile`` of the same update was tried first. It guards every tensor of every call, and compiles for tens of
seconds; ``benchmarks/optimizers.py --torch-compile`` measures it beside this.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from lightning_nested.optim.kernel import Kernel

ALONE = 1 << 17  # elements; fewer take one thread less time than waking the others
_REALS = {torch.float32: ("float", "sqrtf", 4), torch.float64: ("double", "sqrt", 8)}


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
        return library() is not None

    def _update(self, dtype: torch.dtype, columns: Sequence[Sequence[Tensor]], sizes: list[int]) -> None:
        real, _, width = _REALS[dtype]
        function = getattr(library(), f"{self.name}_{real}")
        scalars = (ctypes.c_double * len(self.scalars))(*self.scalars)
        addresses = [[a.data_ptr() for a in column] for column in columns]
        threads = torch.get_num_threads()
        if threads == 1 or sum(sizes) <= ALONE:
            _kernel(function, addresses, sizes, scalars)
            return
        first, *others = _shares(addresses, sizes, width, threads)
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
def library() -> ctypes.CDLL | None:
    """The kernels, compiled when they are first asked for; None where they cannot be, after one warning."""
    try:
        return _compile()
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        warnings.warn(
            f"compiled=True needs a C compiler. Got: {error} Steps run without it, more slowly; install "
            "gcc or clang, or name one in the variable CC.",
            stacklevel=2,
        )
        return None


def _compile() -> ctypes.CDLL:
    """No cache on disk: it would meet other processors, and other users; half a second is cheaper."""
    compiler = (
        shlex.split(os.environ.get("CC", ""))
        or [path for path in map(shutil.which, ("cc", "gcc", "clang")) if path][:1]
    )
    if not compiler:
        raise OSError("none of cc, gcc and clang is on the PATH.")
    source = resources.files(__package__).joinpath("native.c").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        code, target = Path(folder, "native.c"), Path(folder, "native.so")
        parts = []
        for real, root, _ in _REALS.values():
            parts.append(
                f"#define REAL {real}\n#define SQRT {root}\n{_renamed(source, real)}\n#undef REAL\n#undef SQRT\n"
            )
        code.write_text("".join(parts), encoding="utf-8")
        run = None
        for processor in (["-march=native"], []):  # some compilers do not know the first
            command = [
                *compiler,
                "-O3",
                *processor,
                "-fno-math-errno",
                "-std=gnu11",
                "-shared",
                "-fPIC",
                str(code),
            ]
            run = subprocess.run(
                [*command, "-o", str(target), "-lm"], capture_output=True, text=True, timeout=120, check=False
            )
            if run.returncode == 0:
                return ctypes.CDLL(str(target))
        assert run is not None
        raise OSError(f"{compiler[0]} failed: {run.stderr.strip()[:200]}.")


def _renamed(source: str, real: str) -> str:
    """Static functions may be defined once per file."""
    return source.replace("one_", f"one_{real}_")
