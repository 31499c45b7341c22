"""Extra evaluations of a user's module without side effects: on modes, buffers, metrics, attributes and logs."""

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

from lightning_nested.trainer.stand_ins import StandIns

_CONTAINERS = (list, dict, set, deque)
# Parameters, hooks, the Trainer: no attributes of a user's.
_OF_EVERY_MODULE = frozenset(LightningModule().__dict__)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode with gradients, and restore each submodule's own mode on exit."""
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
    """Replace buffers by copies until exit. They are not written back: a graph that holds them stays valid."""
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
    """Restore the states of the module's torchmetrics on exit."""
    kept = []
    for metric in module.modules():
        if not isinstance(metric, Metric):
            continue
        kept.append((metric, dict(metric.__dict__)))
        # A metric may add to its states in place.
        for name in metric._defaults:
            value = getattr(metric, name)
            setattr(metric, name, value.clone() if isinstance(value, Tensor) else list(value))
    try:
        yield
    finally:
        for metric, attributes in kept:
            metric.__dict__.update(attributes)


@contextmanager
def untouched_attributes(module: nn.Module) -> Iterator[None]:
    """Restore plain attributes on exit, and the contents of lists, dicts, sets and deques among them.

    For example counters, and the outputs that a ``validation_step`` collects for the epoch's end. Objects of other
    classes are not looked into.
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
            for key in m.__dict__.keys() - attributes.keys() - _OF_EVERY_MODULE:
                del m.__dict__[key]
            m.__dict__.update(attributes)
            for value, content in contents:
                _refill(value, content)


def _refill(container: Any, content: Any) -> None:
    """Put ``content`` back into ``container``, which other names may hold."""
    container.clear()
    if isinstance(container, list | deque):
        container.extend(content)
    else:
        container.update(content)


@contextmanager
def validation_stage(trainer: Trainer) -> Iterator[None]:
    """Set ``trainer.validating`` instead of ``trainer.training``: batch hooks decide by it about augmentation."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


@contextmanager
def silent_logging(module: LightningModule, trainer: Trainer) -> Iterator[None]:
    """Drop what ``self.log``, ``self.log_dict`` and the loggers are given."""
    loggers, replaced = trainer.loggers, StandIns()
    for name in ("log", "log_dict"):
        replaced.put(module, name, lambda *_, **__: None)
    if loggers:
        trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        replaced.put_back()
        if loggers:
            trainer.loggers = loggers


@contextmanager
def without_trace(module: LightningModule, trainer: Trainer, *, attributes: bool = True) -> Iterator[None]:
    """Restore buffers, metrics, attributes and logging on exit. The caller handles train/eval mode and random state.

    Args:
        module: Module that is evaluated.
        trainer: Trainer whose loggers are silenced.
        attributes: Whether plain attributes are restored too.
    """
    with ExitStack() as stack:
        if attributes:
            stack.enter_context(untouched_attributes(module))
        stack.enter_context(untouched_buffers(module))
        stack.enter_context(untouched_metrics(module))
        stack.enter_context(silent_logging(module, trainer))
        yield
