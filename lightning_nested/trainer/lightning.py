"""Everything that the package takes from inside Lightning: no other file uses a name of it that begins with ``_``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import _update_dataloader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils._pytree import tree_unflatten
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI


def reduction(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """Return the function that averages a tensor over processes; None for a single process."""
    if trainer.world_size == 1:
        return None
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="mean")


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
    step, arguments = getattr(module, name), [batch]
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        arguments.append(batch_idx)
    if is_param_in_hook_signature(step, "dataloader_idx", explicit=True):
        arguments.append(0)
    output = call._call_lightning_module_hook(trainer, name, *arguments, pl_module=module)
    return output.get("loss") if isinstance(output, Mapping) else output


# ---- loops


def accumulates(trainer: Trainer) -> bool:
    """Return True if the gradient of the current batch is only added up, and a later batch makes the step."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def logger_step(trainer: Trainer) -> int:
    """Return the step that the Trainer gives to its loggers, in automatic and manual optimization."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


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


def shard(trainer: Trainer, loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return the loader with the sampler that the Trainer would give it in validation."""
    connector = trainer._data_connector
    if not connector._requires_distributed_sampler(loader):
        return loader
    sampler = connector._resolve_sampler(loader, shuffle=False, mode=RunningStage.VALIDATING)
    sharded: DataLoader[Any] = _update_dataloader(loader, sampler, mode=RunningStage.VALIDATING)
    return sharded


def is_sequential(loader: CombinedLoader) -> bool:
    """Return True if the loader yields its loaders' batches one after another, not joined."""
    return bool(loader._mode == "sequential")


def with_loaders(combined: CombinedLoader, loaders: Sequence[Any]) -> CombinedLoader:
    """Return a loader that combines others in the same structure and mode."""
    return CombinedLoader(tree_unflatten(list(loaders), combined._spec), combined._mode)


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


def synchronizes_batch_norm(trainer: Trainer) -> bool:
    """Return True under ``Trainer(sync_batchnorm=True)``."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def config_value(cli: LightningCLI, key: str) -> Any:
    """Return an option's value, also if it is inside a subcommand's options; None if it is not given."""
    return cli._get(cli.config, key)


def subcommand_parser(cli: LightningCLI) -> LightningArgumentParser:
    """Return the parser of the running subcommand."""
    return cli._parser(cli.subcommand)
