"""Training and testing of further models from a callback: same data and settings as its run, nothing logged."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.warnings import PossibleUserWarning


def fit_like(
    trainer: Trainer,
    module: LightningModule,
    *callbacks: Callback,
    steps: int | None = None,
    **data_options: object,
) -> None:
    """Train ``module`` on the data of ``trainer``: a copy of its datamodule, or its loaders.

    Generators of the loaders' own are put back afterwards, so that one such training sees the order of the next.

    Args:
        trainer: Trainer of the run, on one device.
        module: Module to train in place; not the run's own.
        callbacks: Callbacks of the training.
        steps: Optimizer steps; None: as many as ``trainer`` has made.
        **data_options: Attributes of the datamodule to replace in the copy.
    """
    data = _same_data(trainer)
    for name, value in data_options.items():
        setattr(data["datamodule"], name, value)
    with _quiet(), _kept_generators(data):
        _plain_trainer(trainer, callbacks, steps).fit(module, **data)


def test_like(trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
    """Return metrics of ``module``, which is not the run's own, on the test data of ``trainer``'s datamodule."""
    with _quiet():
        (metrics,) = _plain_trainer(trainer).test(module, **_same_data(trainer), verbose=False)
    return metrics


def validate_like(trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
    """Return metrics of ``module``, which is not the run's own, on the validation data of ``trainer``."""
    data = _same_data(trainer)
    data.pop("train_dataloaders", None)
    if "val_dataloaders" in data:
        data["dataloaders"] = data.pop("val_dataloaders")
    with _quiet():
        found = _plain_trainer(trainer).validate(module, **data, verbose=False)
    return {name: value for metrics in found for name, value in metrics.items()}


@contextmanager
def _kept_generators(data: Mapping[str, Any]) -> Iterator[None]:
    """Put the state of generators back that loaders, their samplers or a datamodule hold."""
    loaders = [loader for given in data.values() for loader in _loaders(given)]
    samplers = [getattr(loader, "sampler", None) for loader in loaders]
    owners = [value for owner in (*data.values(), *loaders, *samplers) for value in _attributes(owner)]
    generators = {id(g): g for g in owners if isinstance(g, torch.Generator)}.values()
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _loaders(given: Any) -> Sequence[Any]:
    return () if given is None or isinstance(given, LightningDataModule) else CombinedLoader(given).flattened


def _attributes(owner: Any) -> list[Any]:
    return list(getattr(owner, "__dict__", {}).values())


def _same_data(trainer: Trainer) -> dict[str, Any]:
    # A copy, because a Trainer writes itself into the datamodule it is given; the tensors are shared.
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is not None:
        return {"datamodule": copy.copy(datamodule)}
    return {"train_dataloaders": trainer.train_dataloader, "val_dataloaders": trainer.val_dataloaders}


def _plain_trainer(trainer: Trainer, callbacks: Sequence[Callback] = (), steps: int | None = None) -> Trainer:
    device = trainer.strategy.root_device
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = dict.fromkeys(silent, False)
    return Trainer(
        accelerator=device.type,
        devices=[device.index] if device.type == "cuda" and device.index is not None else 1,
        precision=trainer.precision,
        max_epochs=-1,
        max_steps=trainer.global_step if steps is None else steps,
        callbacks=list(callbacks),
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        limit_train_batches=trainer.limit_train_batches,
        # Validated as often as the run, because each pass draws from the stream that orders the batches.
        limit_val_batches=trainer.limit_val_batches,
        val_check_interval=trainer.val_check_interval,
        check_val_every_n_epoch=trainer.check_val_every_n_epoch,
        # Left out without effect on the random numbers: Lightning restores their state after these.
        num_sanity_val_steps=0,
        limit_test_batches=trainer.limit_test_batches,
        default_root_dir=trainer.default_root_dir,
        **options,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning on devices and step limits; the run itself had its advice."""
    with ExitStack() as stack, warnings.catch_warnings():
        for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        warnings.simplefilter("ignore", PossibleUserWarning)
        # From torch to Lightning, repeated for every Trainer.
        warnings.simplefilter("ignore", FutureWarning)
        yield
