"""Which objects that a module reaches belong to the user's code alone."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader, Dataset, Sampler

# Libraries whose plain objects may be shared with the rest of the run.
_FOREIGN = frozenset([
    "builtins", "asyncio", "concurrent", "dask", "jax", "lightning", "lightning_fabric", "lightning_nested",
    "lightning_utilities", "logging", "matplotlib", "mlflow", "multiprocessing", "neptune", "pandas",
    "pytorch_lightning", "queue", "ray", "socket", "subprocess", "tensorboard", "threading", "torch", "tqdm", "wandb",
    "weakref",
])  # fmt: skip
_ELSEWHERE = (Callback, LightningDataModule, Logger, Dataset, DataLoader, Sampler, Enum, BaseException, type)
_SHARED = (
    io.IOBase,
    threading.Thread,
    threading.Event,
    threading.Condition,
    type(threading.Lock()),
    type(threading.RLock()),
)


def is_foreign(kind: type) -> bool:
    """Return True for a class of a library that has objects of its own in a run."""
    return kind.__module__.partition(".")[0] in _FOREIGN


def is_shared(value: object) -> bool:
    """Return True for an object that holds a lock, a thread or an open file: others use it at the same time."""
    held = getattr(value, "__dict__", {})
    return any(issubclass(kind, _SHARED) for kind in set(map(type, held.values())))


def has_own_attributes(kind: type[Any]) -> bool:
    """Return True if objects of the class are the user's, and have attributes."""
    if issubclass(kind, (*_ELSEWHERE, *_SHARED)):
        return False
    if is_foreign(kind) and not issubclass(kind, torch.optim.Optimizer):
        return False
    return kind.__dictoffset__ != 0 or bool(slots(kind))  # type: ignore[arg-type]


def is_plain_iterator(kind: type) -> bool:
    """Return True for iterators of Python itself, generators too, and of a DataLoader."""
    home = kind.__module__
    return issubclass(kind, Iterator) and (
        home in ("builtins", "itertools") or home.startswith("torch.utils.data.dataloader")
    )


@cache
def slots(kind: type[Any]) -> tuple[str, ...]:
    """Return the names of ``__slots__`` in the user's classes among the bases."""
    found = (vars(base).get("__slots__", ()) for base in kind.__mro__ if not is_foreign(base))
    names = (name for names in found for name in ([names] if isinstance(names, str) else names))
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def is_data(name: str, value: object) -> bool:
    """Return True for a class attribute that is neither a method nor Python's own."""
    return not name.startswith("__") and not callable(value) and not hasattr(value, "__get__")
