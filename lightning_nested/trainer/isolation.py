"""Extra evaluations of a user's module without side effects: on its modes, its state, and the logs.

What is found and restored is in ``reachable_state``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import nn

from lightning_nested.networks.evaluation_mode import restored_modes
from lightning_nested.trainer.reachable_state import untouched_networks, untouched_state
from lightning_nested.trainer.shards import gather_anew, shards_parameters
from lightning_nested.trainer.silent_loggers import SilentLogger
from lightning_nested.trainer.stand_ins import StandIns


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode with gradients, and restore each submodule's own mode on exit."""
    with restored_modes(module):
        parts = list(module.modules())
        for part in parts:
            part.training = False
        # A cuDNN RNN in evaluation mode has no backward; the native one has.
        needs_native = any(isinstance(part, nn.RNNBase) for part in parts)
        native = torch.backends.cudnn.flags(enabled=False) if needs_native else nullcontext()
        with torch.enable_grad(), native:
            yield


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
    """Drop what ``self.log``, ``self.log_dict`` and the loggers are given; folders and names can still be read."""
    loggers, replaced = trainer.loggers, StandIns()
    for name in ("log", "log_dict"):
        replaced.put(module, name, lambda *_, **__: None)
    if loggers:
        trainer.loggers = [SilentLogger(logger) for logger in loggers]  # type: ignore[misc]
    try:
        yield
    finally:
        replaced.put_back()
        if loggers:
            trainer.loggers = loggers


@contextmanager
def without_trace(
    module: LightningModule,
    trainer: Trainer,
    *others: object,
    attributes: bool = True,
    caller: str | None = None,
) -> Iterator[None]:
    """Restore on exit all that an evaluation of the module may change; see :func:`untouched_state`.

    Logs are dropped, and so is a wish to stop the run. The caller handles train/eval mode and random state.

    Args:
        module: Module that is evaluated.
        trainer: Trainer whose loggers are silenced.
        others: Further objects that the evaluation may change: a function stands for what it refers to.
        attributes: Whether plain attributes are restored too, not only networks and metrics; see
            :func:`untouched_networks`.
        caller: Who evaluates what, and when: added to an exception that comes from inside.
    """
    trained = (
        p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
    )
    should_stop = trainer.should_stop
    if shards_parameters(trainer):
        gather_anew(module)
    untouched = untouched_state if attributes else untouched_networks
    with untouched(module, *others, trained=trained), silent_logging(module, trainer):
        try:
            yield
        except Exception as error:
            if caller is not None:
                add_note(error, caller)
            raise
        finally:
            trainer.should_stop = should_stop


def add_note(error: BaseException, note: str) -> None:
    """Add a line to an exception, below its message.

    >>> try:
    ...     raise ValueError("No shape")
    ... except ValueError as error:
    ...     add_note(error, "Called by a test.")
    ...     "test" in str(error) or "test" in error.__notes__[0]
    True
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    # Python 3.10.
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
