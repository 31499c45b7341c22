"""Silence Lightning's advice about checkpoints in manual optimization."""

from __future__ import annotations

import warnings
from contextlib import ExitStack

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class WithoutCheckpointAdvice(Callback):
    """Silences, during ``fit``, the advice of ModelCheckpoint to save the state before the step.

    For modules that resume after a complete update, as games do.
    """

    def __init__(self) -> None:
        self._scope = ExitStack()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._scope.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._scope.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._scope.close()
