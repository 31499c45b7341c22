"""Everything that the package takes from inside Lightning: no other file uses a name of it that begins with ``_``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import _update_dataloader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_unflatten
from torch.utils.data import DataLoader, Sampler

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI


def reduction(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """Return the function that averages a tensor over processes; None for a single process."""
    if trainer.world_size == 1:
        return None
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="mean")


def show_in_progress_bar(trainer: Trainer, numbers: Mapping[str, float]) -> None:
    """Show numbers in the progress bar until they are replaced.

    ``self.log(..., prog_bar=True)`` would make metrics of them: a module's own ``outer_loss``, which a checkpoint or
    early stopping may monitor, would be overwritten, or refused as logged twice.
    """
    trainer.progress_bar_metrics.update(numbers)


def transfer(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """Move a batch to the module's device, through the hooks that the Trainer's own batches pass."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def step_loss(
    trainer: Trainer,
    module: LightningModule,
    name: Literal["training_step", "validation_step"],
    batch: Any,
    batch_idx: int,
) -> Any:
    """Call a step of the module with the arguments of its signature; return the loss in its output."""
    step = getattr(module, name)
    # Anything but a method may hold the module, which must not be kept alive.
    own = getattr(step, "__func__", None)
    takes_index, takes_loader = _arguments_of.__wrapped__(step) if own is None else _arguments_of(own)
    arguments = [batch, *[batch_idx] * takes_index, *[0] * takes_loader]
    output = call._call_lightning_module_hook(trainer, name, *arguments, pl_module=module)
    return output.get("loss") if isinstance(output, Mapping) else output


@lru_cache(maxsize=32)
def _arguments_of(step: Any) -> tuple[bool, bool]:
    """Return whether a step takes ``batch_idx`` and ``dataloader_idx``; looking takes longer than a small network."""
    return (
        is_param_in_hook_signature(step, "batch_idx", min_args=2),
        is_param_in_hook_signature(step, "dataloader_idx", explicit=True),
    )


def loss_scale(trainer: Trainer) -> float:
    """Return the factor on the loss that ``on_before_backward`` receives in fp16."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def skips_step(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Return True if a GradScaler is about to skip the step of an optimizer, a gradient of which is not finite."""
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return not bool(torch.stack([g.isfinite().all() for g in gradients]).all()) if gradients else False


# ---- loops


def accumulates(trainer: Trainer) -> bool:
    """Return True if the gradient of the current batch is only added up, and a later batch makes the step."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def logger_step(trainer: Trainer) -> int:
    """Return the step that the Trainer gives to its loggers, in automatic and manual optimization."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


class Clock(Protocol):
    """Module with a clock of its own: updates made, and whether another has begun."""

    game_updates: int

    def has_open_update(self) -> bool:
        """Return True from the first batch of an update until its last player has stepped."""


def log_by_game_updates(trainer: Trainer) -> None:
    """Let all that is logged stand at the game updates of the module, while the Trainer runs a module that has them.

    That is the user's ``self.log``, in training, validation and at the end of epochs, and callbacks that ask the
    Trainer for its step, such as ``LearningRateMonitor``. A number per step is logged once an update.
    """
    parts: dict[type, Any] = {
        _ClockedLoop: trainer.fit_loop.epoch_loop,
        _ClockedConnector: trainer._logger_connector,
    }
    for clocked, part in parts.items():
        if not isinstance(part, clocked):
            part.__class__ = _mixed(clocked, type(part))


def _mixed(clocked: type, kind: type) -> type:
    return type(kind.__name__, (clocked, kind), {})


def _clock(trainer: Trainer) -> Clock | None:
    """Return the running module if it has game updates; the Trainer may run another one next."""
    module = trainer.lightning_module
    return cast(Clock, module) if hasattr(module, "has_open_update") else None


class _ClockedLoop:
    """Part of Lightning's loop over batches: ``_batches_that_stepped`` is the step that loggers get."""

    trainer: Trainer

    @property
    def _batches_that_stepped(self) -> int:
        clock = _clock(self.trainer)
        return int(self.__dict__["_batches_that_stepped"]) if clock is None else clock.game_updates

    @_batches_that_stepped.setter
    def _batches_that_stepped(self, count: int) -> None:
        if _clock(self.trainer) is None:
            self.__dict__["_batches_that_stepped"] = count


class _ClockedConnector:
    """Part of Lightning's connector to loggers that chooses when they are due, and the step in validation."""

    trainer: Trainer

    @property
    def should_update_logs(self) -> bool:
        clock, every = _clock(self.trainer), self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if clock is None or every == 0 or not isinstance(self.trainer._active_loop, _FitLoop):
            return bool(super().should_update_logs)  # type: ignore[misc]
        is_due = not clock.has_open_update() and clock.game_updates % every == 0
        return is_due or bool(self.trainer.should_stop)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        clock = _clock(self.trainer)
        # in validation Lightning gives the number of the validation batch
        step = step if step is None or clock is None else clock.game_updates
        super().log_metrics(metrics, step)  # type: ignore[misc]


@contextmanager
def counted(optimizer: LightningOptimizer, counts: bool) -> Iterator[None]:
    """Let ``trainer.global_step`` count the optimizer's steps inside, or not."""
    hooks = optimizer._on_before_step, optimizer._on_after_step
    if not counts:
        optimizer._on_before_step = optimizer._on_after_step = lambda: None
    try:
        yield
    finally:
        optimizer._on_before_step, optimizer._on_after_step = hooks


# ---- loaders


def request_validation_loader(trainer: Trainer) -> Any:
    """Ask the module or datamodule for the validation loader of ``fit``; None if there is none."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return _request_dataloader(source) if source.instance is not None and source.is_defined() else None


_Split = Literal["train", "val", "test"]


def _sources(trainer: Trainer, split: _Split) -> list[Any]:
    """Return where the loaders of a split may come from, those of ``fit`` first."""
    loops: dict[str, list[Any]] = {
        "train": [trainer.fit_loop],
        "val": [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop],
        "test": [trainer.test_loop],
    }
    sources = [loop._data_source for loop in loops[split]]
    return [source for source in sources if source.instance is not None and source.is_defined()]


def has_loader(trainer: Trainer, split: _Split) -> bool:
    """Return True if the Trainer was given a loader for a split, or the module or datamodule defines one."""
    return bool(_sources(trainer, split))


def given_loader(trainer: Trainer, split: _Split) -> Any:
    """Return the loader of a split as it was passed to the Trainer; None: the module or datamodule defines it."""
    sources = _sources(trainer, split)
    return None if not sources or sources[0].is_module() else sources[0].instance


def request_loader(trainer: Trainer, split: _Split) -> Any:
    """Ask for the loader of a split, not yet sharded over processes."""
    return _request_dataloader(_sources(trainer, split)[0])


def training_loader(trainer: Trainer) -> Any:
    """Return the training loader of a running ``fit``; a CombinedLoader where there are several."""
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    return combined.iterables if isinstance(combined.iterables, DataLoader) else combined


def shard(trainer: Trainer, loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return the loader with the sampler that the Trainer would give it in validation."""
    connector = trainer._data_connector
    if not connector._requires_distributed_sampler(loader):
        return loader
    sampler = connector._resolve_sampler(loader, shuffle=False, mode=RunningStage.VALIDATING)
    sharded: DataLoader[Any] = _update_dataloader(loader, sampler, mode=RunningStage.VALIDATING)
    return sharded


def wrapped_sampler(sampler: Any) -> Sampler[Any] | None:
    """Return the sampler whose draws the Trainer shares out among processes; None where the sampler shares out data."""
    shared: Any = sampler.dataset if isinstance(sampler, DistributedSamplerWrapper) else None
    return getattr(shared, "_sampler", None)


def is_sequential(loader: CombinedLoader) -> bool:
    """Return True if the loader yields its loaders' batches one after another, not joined."""
    return bool(loader._mode == "sequential")


def with_loaders(combined: CombinedLoader, loaders: Sequence[Any]) -> CombinedLoader:
    """Return a loader that combines others in the same structure and mode."""
    return CombinedLoader(tree_unflatten(list(loaders), combined._spec), combined._mode)


def shut_down_workers(iterator: object) -> None:
    """End the worker processes of a DataLoader's iterator, if it has any; torch has no public name for it."""
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


# ---- modules, strategies, command line


def has_trainer(module: LightningModule) -> bool:
    """Return True if the module is attached to a Trainer."""
    return module._trainer is not None


def built_by_command_line() -> bool:
    """Return True while LightningCLI builds a module from a configuration."""
    return _given_hyperparameters.get() is not None


def has_static_graph(trainer: Trainer) -> bool:
    """Return True under ``DDPStrategy(static_graph=True)``."""
    return bool(getattr(trainer.strategy, "_ddp_kwargs", {}).get("static_graph"))


def tensor_parallel_size(trainer: Trainer) -> int:
    """Return the processes that share each layer's work under ``ModelParallelStrategy``."""
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    return 1 if mesh is None else int(mesh["tensor_parallel"].size())


def synchronizes_batch_norm(trainer: Trainer) -> bool:
    """Return True under ``Trainer(sync_batchnorm=True)``."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def config_value(cli: LightningCLI, key: str) -> Any:
    """Return an option's value, also if it is inside a subcommand's options; None if it is not given."""
    return cli._get(cli.config, key)


def subcommand_parser(cli: LightningCLI) -> LightningArgumentParser:
    """Return the parser of the running subcommand."""
    return cli._parser(cli.subcommand)
