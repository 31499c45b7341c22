"""C of the package, compiled when it is first asked for by the system's compiler, in some tenths of a second.

No cache on disk: it would meet other processors, and other users; compiling again is cheap.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from importlib import resources
from pathlib import Path

import torch

_REALS = {torch.float32: "-DREAL=float -DWIDTH=32", torch.float64: "-DREAL=double -DWIDTH=64"}


def build(package: str, file: str, dtype: torch.dtype, otherwise: str) -> ctypes.CDLL | None:
    """Compile a file, with ``REAL`` defined as the type of its numbers and ``WIDTH`` as the number of its bits.

    Args:
        package: That holds the file.
        file: Its name.
        dtype: float32 or float64.
        otherwise: What happens without it, a clause for the warning.

    Returns:
        The library, or None after a warning where it cannot be had.
    """
    try:
        with resources.as_file(resources.files(package).joinpath(file)) as source:
            return _compile(source, _REALS[dtype].split())
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        reason = str(error).strip().rstrip(".")
        warnings.warn(
            f"compiled=True needs a C compiler. Got: {reason}. {otherwise}; install gcc or clang, or name one in the "
            "variable CC.",
            stacklevel=3,
        )
        return None


def _compile(source: Path, definitions: list[str]) -> ctypes.CDLL:
    compiler = (
        shlex.split(os.environ.get("CC", ""))
        or [path for path in map(shutil.which, ("cc", "gcc", "clang")) if path][:1]
    )
    if not compiler:
        raise OSError("none of cc, gcc and clang is on the PATH")
    options = [
        "-O3",
        "-fno-fast-math",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-std=gnu11",
        "-shared",
        "-fPIC",
    ]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        target = Path(folder, "native.so")
        run = None
        for processor in (["-march=native"], []):  # some compilers do not know the first
            run = subprocess.run(
                [*compiler, *processor, *options, *definitions, str(source), "-o", str(target), "-lm"],
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            if run.returncode == 0:
                return ctypes.CDLL(str(target))
        assert run is not None
        said = run.stderr.strip()[:200] or f"exit code {run.returncode}"
        raise OSError(f"{compiler[0]} failed: {said}")
