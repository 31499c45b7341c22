"""Executors of the branches of a ride: this process, several processes, or a Ray cluster."""

from __future__ import annotations

import os
import pickle
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any, TypeAlias

import torch
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.extras import require_package

Chunk: TypeAlias = Sequence[Any]
Work: TypeAlias = Callable[[Chunk], Any]
_IN_PROCESS = 256


@dataclass(frozen=True, kw_only=True)
class Executor(ABC):
    """Runs a function on chunks of jobs.

    The jobs of one chunk run together through ``vmap``, and are finished together. Chunks of another size change
    results by rounding.

    Attributes:
        batch_size: Jobs in a chunk; None: up to 256 in this process, elsewhere four chunks for each worker.
    """

    batch_size: int | None = None

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size)

    def chunks(self, jobs: Chunk) -> list[Chunk]:
        """Split jobs into chunks of ``batch_size``."""
        size = self.batch_size
        if size is None:
            # Four chunks for each worker: few maps to record, and workers end at about the same time.
            workers = self._workers()
            size = _IN_PROCESS if workers is None else max(1, -(-len(jobs) // (4 * workers)))
        return [jobs[i : i + size] for i in range(0, len(jobs), size)]

    def _workers(self) -> int | None:
        return None

    @abstractmethod
    def map(self, function: Work, chunks: Sequence[Chunk]) -> Iterator[Any]:
        """Yield results as they are finished, in any order.

        Raises:
            TypeError: The function cannot be sent to another process.
        """


@checked
@dataclass(frozen=True, kw_only=True)
class InProcess(Executor):
    """Runs in this process, one chunk after the other."""

    @override
    def map(self, function: Work, chunks: Sequence[Chunk]) -> Iterator[Any]:
        return map(function, chunks)


@checked
@dataclass(frozen=True, kw_only=True)
class Processes(Executor):
    """Runs in several processes of this machine, each with one thread.

    Attributes:
        max_workers: Number of processes; None: one per core.
    """

    max_workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, max_workers=self.max_workers)

    @override
    def _workers(self) -> int:
        return self.max_workers or os.cpu_count() or 1

    @override
    def map(self, function: Work, chunks: Sequence[Chunk]) -> Iterator[Any]:
        _check_picklable(function)
        # Spawned, not forked: a process with threads must not fork.
        pool = ProcessPoolExecutor(self.max_workers, mp_context=get_context("spawn"), initializer=_begin)
        try:
            for future in as_completed([pool.submit(function, chunk) for chunk in chunks]):
                yield future.result()
        finally:  # an interruption must not wait for everything that is queued
            pool.shutdown(cancel_futures=True)


@checked
@dataclass(frozen=True, kw_only=True)
class Ray(Executor):
    """Runs on a Ray cluster; needs ``pip install lightning-nested[ray]``.

    Attributes:
        address: Address for ``ray.init``; None: the cluster this process belongs to, or a new one here.
    """

    address: str | None = None

    @override
    def _workers(self) -> int:
        return int(self._cluster().cluster_resources().get("CPU", 1))

    def _cluster(self) -> Any:
        """Return the module ray, connected to its cluster."""
        require_package("ray")
        import ray

        if not ray.is_initialized():
            ray.init(address=self.address)
        return ray

    @override
    def map(self, function: Work, chunks: Sequence[Chunk]) -> Iterator[Any]:
        _check_picklable(function)
        ray = self._cluster()
        remote: Any = ray.remote(_call)
        sent = ray.put(function)  # once, not with every chunk
        waiting = [remote.remote(sent, chunk) for chunk in chunks]
        try:
            while waiting:
                done, waiting = ray.wait(waiting)
                yield from ray.get(done)
        finally:
            for task in waiting:
                ray.cancel(task)


def _call(function: Work, chunk: Chunk) -> Any:
    torch.set_num_threads(1)
    return function(chunk)


def _begin() -> None:
    """Set up a new process: one thread, and an end with the process that started it, even if that is killed."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _check_picklable(function: object) -> None:
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            "Branches in other processes need a game and an optimizer that can be pickled. "
            f"Got: {error}. Use a class or a function of a module, and functools.partial(SGD, lr=...) in place of a "
            "lambda; or run in this process with InProcess()."
        ) from error
