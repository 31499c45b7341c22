"""What the callback and the module with nested loops both need from a running Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nested.callbacks.isolation import RandomStream
from lightning_nested.hypergradient import GaussNewton
from lightning_nested.hyperparameters import OuterReport


def reduction(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """The mean over processes; None where there is one."""
    if trainer.world_size == 1:
        return None
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="mean")


def transfer(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """A batch on the module's device, through the hooks that the Trainer's own batches pass."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def coupled_decay(optimizer: Optimizer) -> list[float]:
    """The inner optimizer's own L2 penalty of each parameter, where it is part of the gradient."""
    known = (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad)
    return [
        float(group.get("weight_decay", 0.0))
        if isinstance(optimizer, known) and not group.get("decoupled_weight_decay", False)
        else 0.0
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    ]


def named_outputs(module: nn.Module, curvature: GaussNewton) -> nn.Module:
    """The submodule that ``GaussNewton(outputs="name")`` names."""
    modules = dict(module.named_modules())
    if not isinstance(curvature.outputs, str) or curvature.outputs not in modules:
        raise MisconfigurationException(
            "GaussNewton(outputs=...) must be the dotted name of the submodule that returns the logits. "
            f"Got {curvature.outputs!r}; {type(module).__name__} has {', '.join(filter(None, modules))}."
        )
    found: nn.Module = modules[curvature.outputs]
    return found


@torch.no_grad()
def reinitialize(
    module: nn.Module,
    initial: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    keep: Iterable[Tensor],
    seed: int,
) -> None:
    """New initial weights by each submodule's ``reset_parameters``, the same on every process.

    Args:
        module: Its submodules are reset, except those that own a tensor of ``keep``.
        initial: Values for parameters that no ``reset_parameters`` reaches.
        parameters: Where they belong.
        keep: Hyperparameters.
        seed: Of the new weights.
    """
    kept = {id(t) for t in keep}
    for name, parameter in parameters.items():
        parameter.copy_(initial[name])
    device = next(iter(parameters.values())).device
    with RandomStream(seed, device):
        for submodule in module.modules():
            reset = getattr(submodule, "reset_parameters", None)
            if callable(reset) and not any(id(p) in kept for p in submodule.parameters(recurse=False)):
                reset()


def log_outer_step(
    module: LightningModule, report: OuterReport, values: Mapping[str, Tensor], skipped: int
) -> None:
    """Diagnostics and values in natural units; a histogram too where a hyperparameter has many entries.

    Loggers are given them here, once, at the step they belong to: ``self.log(..., on_step=True)`` would repeat the
    last value at every later step, and drop those that fall between two of the Trainer's ``log_every_n_steps``.
    ``self.log`` gives them to the progress bar, checkpoints and early stopping.
    """
    trainer = module.trainer
    step = (
        trainer.fit_loop.epoch_loop._batches_that_stepped
    )  # the Trainer's own axis, also in manual optimization
    metrics = {f"hypergradient/{key}": value for key, value in report.metrics().items()}
    metrics["hypergradient/skipped_steps"] = float(skipped)
    for name, value in values.items():
        if value.numel() == 1:
            metrics[f"hyperparameters/{name}"] = float(value)
            continue
        metrics[f"hyperparameters/{name}/mean"] = float(value.mean())
        for logger in trainer.loggers:
            add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
            if add_histogram is not None:
                add_histogram(f"hyperparameters/{name}", value.float().cpu(), step)
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step)
    module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1, logger=False)
