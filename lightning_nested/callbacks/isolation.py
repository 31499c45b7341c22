"""Extra evaluations of a user's module that leave no trace: modes, buffers, metrics, logs, random numbers."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torchmetrics import Metric


class RandomStream:
    """A stream of random numbers beside the global one, for torch, NumPy and ``random``.

    >>> stream = RandomStream(0)
    >>> with stream:
    ...     first = torch.rand(1)
    >>> with RandomStream(0):
    ...     bool(torch.rand(1) == first)
    True
    """

    def __init__(self, seed: int, device: torch.device | None = None) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._outside: list[tuple[Any, ...]] = []
        self._inside: tuple[Any, ...] | None = None
        self._seed = seed % 2**32

    def __enter__(self) -> RandomStream:
        self._outside.append(self._capture())
        if self._inside is None:
            random.seed(self._seed)
            np.random.seed(self._seed)
            torch.random.default_generator.manual_seed(self._seed)
            if self._cuda is not None:
                with torch.cuda.device(self._cuda):
                    torch.cuda.manual_seed(self._seed)
        else:
            self._restore(self._inside)
        return self

    @classmethod
    def snapshot(cls, device: torch.device | None = None) -> RandomStream:
        """A stream that begins where the global one is now."""
        stream = cls(0, device)
        stream._inside = stream._capture()
        return stream

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, the random numbers from this stream's present position, each time the same ones."""
        here = self._inside
        with self:
            yield
        self._inside = here

    def __exit__(self, *_: object) -> None:
        self._inside = self._capture()
        self._restore(self._outside.pop())

    def _capture(self) -> tuple[Any, ...]:
        cuda = torch.cuda.get_rng_state(self._cuda) if self._cuda is not None else None
        return torch.get_rng_state(), np.random.get_state(), random.getstate(), cuda

    def _restore(self, state: tuple[Any, ...]) -> None:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])
        if self._cuda is not None:
            torch.cuda.set_rng_state(state[3], self._cuda)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients; each submodule's own mode comes back."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        # A cuDNN RNN in evaluation mode has no backward; the native one has.
        needs_native = any(isinstance(m, nn.RNNBase) for m in module.modules())
        with (
            torch.enable_grad(),
            torch.backends.cudnn.flags(enabled=not needs_native and torch.backends.cudnn.enabled),
        ):
            yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def untouched_buffers(module: nn.Module) -> Iterator[None]:
    """Buffers are swapped for copies, not written back: a graph that holds the originals stays valid."""
    homes = [(m._buffers, key, b) for m in module.modules() for key, b in m._buffers.items() if b is not None]
    for buffers, key, buffer in homes:
        buffers[key] = buffer.clone()
    try:
        yield
    finally:
        for buffers, key, buffer in homes:
            buffers[key] = buffer


@contextmanager
def untouched_metrics(module: nn.Module) -> Iterator[None]:
    """The states of torchmetrics inside the module are as before afterwards."""
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    kept = []
    for metric in metrics:
        kept.append(
            (metric, dict(metric.__dict__), {name: getattr(metric, name) for name in metric._defaults})
        )
        for name in metric._defaults:
            value = getattr(metric, name)
            setattr(metric, name, value.clone() if isinstance(value, Tensor) else list(value))
    try:
        yield
    finally:
        for metric, attributes, states in kept:
            metric.__dict__.update(attributes)
            for name, value in states.items():
                setattr(metric, name, value)


_CONTAINERS = (list, dict, set, deque)
_OF_EVERY_MODULE = frozenset(
    LightningModule().__dict__
)  # parameters, hooks, the Trainer: none of them a user's


@contextmanager
def untouched_attributes(module: nn.Module) -> Iterator[None]:
    """Plain attributes, and what lists, dicts, sets and deques among them hold, are as before afterwards.

    Counters, and the outputs that a ``validation_step`` collects for the epoch's end. Objects of other classes are
    not looked into.
    """
    kept = []
    for m in module.modules():
        if not isinstance(m, Metric):  # see untouched_metrics
            attributes = {key: value for key, value in m.__dict__.items() if key not in _OF_EVERY_MODULE}
            contents = [
                (value, copy.copy(value)) for value in attributes.values() if isinstance(value, _CONTAINERS)
            ]
            kept.append((m, attributes, contents))
    try:
        yield
    finally:
        for m, attributes, contents in kept:
            for key in [key for key in m.__dict__ if key not in _OF_EVERY_MODULE and key not in attributes]:
                del m.__dict__[key]
            m.__dict__.update(attributes)
            for value, content in contents:
                _refill(value, content)


def _refill(container: Any, content: Any) -> None:
    """Put ``content`` back into ``container``, which other names may hold."""
    if isinstance(container, list):
        container[:] = content
        return
    container.clear()
    if isinstance(container, deque):
        container.extend(content)
    else:
        container.update(content)


class StandIns:
    """Attributes of a module that others stand in for, until they are put back.

    >>> module, stand_ins = nn.Linear(1, 1), StandIns()
    >>> stand_ins.put(module, "forward", lambda x: x)
    >>> module.forward(3)
    3
    >>> stand_ins.put_back()
    >>> "forward" in vars(module)
    False
    """

    _ABSENT = object()

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, str, object]] = []

    def put(self, module: nn.Module, name: str, value: object) -> None:
        """Let ``value`` be the instance's attribute; it may hide one of the class."""
        self._replaced.append((module, name, module.__dict__.get(name, self._ABSENT)))
        module.__dict__[name] = value

    def put_back(self) -> None:
        """Every attribute as it was, the last one first."""
        while self._replaced:
            module, name, value = self._replaced.pop()
            if value is self._ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value


@contextmanager
def validation_stage(trainer: Trainer) -> Iterator[None]:
    """``trainer.validating`` instead of ``trainer.training``: batch hooks tell augmentation by it."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


@contextmanager
def silent_logging(module: LightningModule, trainer: Trainer) -> Iterator[None]:
    """``self.log``, ``self.log_dict`` and the loggers swallow what they are given."""

    def swallow(*_: object, **__: object) -> None:
        return None

    loggers = trainer.loggers
    own: dict[str, Any] = {
        name: module.__dict__[name] for name in ("log", "log_dict") if name in module.__dict__
    }
    module.__dict__.update({"log": swallow, "log_dict": swallow})
    if loggers:
        trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            module.__dict__.pop(name, None)
        module.__dict__.update(own)
        if loggers:
            trainer.loggers = loggers


@contextmanager
def without_trace(module: LightningModule, trainer: Trainer, *, attributes: bool = True) -> Iterator[None]:
    """An evaluation inside changes no buffer, metric, attribute or log. Modes and random numbers are the caller's.

    Args:
        module: What is evaluated.
        trainer: Whose logs are kept silent.
        attributes: Whether plain attributes are put back too.
    """
    with ExitStack() as stack:
        if attributes:
            stack.enter_context(untouched_attributes(module))
        stack.enter_context(untouched_buffers(module))
        stack.enter_context(untouched_metrics(module))
        stack.enter_context(silent_logging(module, trainer))
        yield
