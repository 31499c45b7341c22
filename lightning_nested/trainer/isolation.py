"""Extra evaluations of a user's module that leave no trace: modes, buffers, metrics, logs, random numbers."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torchmetrics import Metric


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
