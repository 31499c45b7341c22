"""What every test shares: one thread, explicit generators, and data that may be missing."""

import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Protocol

import pytest
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


class Normal(Protocol):
    """Draws standard normal float64 tensors."""

    def __call__(self, *shape: int) -> Tensor: ...


def pytest_configure() -> None:
    # Not a fixture: doctests need it as well. The tensors here are too small for a second thread to help, and
    # sums split over threads differ in the last bits from one machine to the next.
    torch.set_num_threads(1)
    # Commands that tests run in processes of their own: pytest-xdist's workers have a core each.
    os.environ["OMP_NUM_THREADS"] = "1"
    # NumPy's threads are OpenBLAS's own: on a machine that others use, eigenvalues of 180 × 180 took 50 times as long.
    threadpool_limits(1, user_api="blas")
    # Each Trainer asks which callbacks other packages register: the metadata of all of them, most of its own time.
    importlib.metadata.entry_points = cache(importlib.metadata.entry_points)
    # If a process takes its first derivative inside torch.func, its forks cannot take any (strategy="ddp_fork").
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """Seed the global stream, give loggers their levels back, and refuse tests that leave settings to the next one."""
    torch.manual_seed(0)
    # Scripts and benchmarks silence them.
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    assert dtype == torch.float32, f"the test left default dtype {dtype} behind: pass dtype= instead"
    assert grad, "the test left gradients disabled"


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in a folder of the test's own as the command does, and remove the variables that seeding leaves behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-nested"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own LightningCLI raises some
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator of the test's own, seeded with 0."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def normal(generator: torch.Generator) -> Normal:
    """`normal(3, 2)`: a standard normal float64 tensor of that shape, from `generator`."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return draw


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """The folder of the four Fashion-MNIST files; the test is skipped where there is none."""
    if not (FASHION_MNIST / "train-images-idx3-ubyte.gz").exists():
        pytest.skip(f"no Fashion-MNIST in {FASHION_MNIST}: apt-get install dataset-fashion-mnist")
    return FASHION_MNIST
