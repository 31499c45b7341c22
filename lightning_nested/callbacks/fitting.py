"""What the callback and the module with nested loops both need from a running Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, XLAStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
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


def refuse_strategy(trainer: Trainer, who: str, *, static_graph: bool = True) -> None:
    """Refuse strategies that shard parameters or own the backward pass.

    Args:
        trainer: Its strategy is looked at.
        who: For the message.
        static_graph: Whether DDP may take the graph to be static.

    Raises:
        MisconfigurationException: With a cure.
    """
    strategy = trainer.strategy
    whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    # DeepSpeed and XLA are kinds of DDP to Lightning, and keep parameters and gradients elsewhere.
    if not whole or isinstance(strategy, DeepSpeedStrategy | XLAStrategy):
        raise MisconfigurationException(
            f"{who} needs whole parameters on every process: a single device or DDP. "
            f"Got {type(strategy).__name__}; use Trainer(strategy='ddp')."
        )
    if not static_graph and getattr(strategy, "_ddp_kwargs", {}).get("static_graph"):
        # DDP queues its first all-reduce in the first derivative that passes, which here is not its own.
        raise MisconfigurationException(
            f"{who} differentiates the training loss before DDP does, so DDP must not take the graph to be static. "
            "Got DDPStrategy(static_graph=True); leave it out."
        )


_DECOUPLED = (torch.optim.AdamW, torch.optim.Adafactor)


def coupled_decay(optimizer: Optimizer) -> list[float]:
    """The inner optimizer's own L2 penalty of each parameter, where it is part of the gradient.

    So it is in every optimizer of ``torch.optim`` and of this package but those that say otherwise. Of other
    classes it is not known; they are taken to be decoupled, with a warning.
    """
    home = type(optimizer).__module__.split(".")[:2]
    known = home in (["torch", "optim"], ["lightning_nested", "optim"])
    if not known and any(group.get("weight_decay") for group in optimizer.param_groups):
        rank_zero_warn(
            f"Whether the weight_decay of {type(optimizer).__name__} is part of the gradient is not known; the "
            "hypergradient leaves it out. Set it to 0 and tune WeightDecay() instead."
        )
    return [
        float(group.get("weight_decay", 0.0))
        if known
        and not isinstance(optimizer, _DECOUPLED)
        and type(optimizer).__name__ != "Muon"
        and not group.get("decoupled_weight_decay", False)
        else 0.0
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    ]


def trainable(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer moves, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def step_arguments(step: Callable[..., Any], batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """What the Trainer would call ``training_step`` or ``validation_step`` with, given its signature."""
    arguments = [batch]
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        arguments.append(batch_idx)
    if is_param_in_hook_signature(step, "dataloader_idx", explicit=True):
        arguments.append(0)
    return tuple(arguments)


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
    seed: int,
) -> None:
    """New initial weights by each submodule's ``reset_parameters``, the same on every process.

    Args:
        module: Its submodules are reset, if all parameters that they own are among ``parameters``: not what is
            frozen, is tuned, or has none.
        initial: Values for parameters that no ``reset_parameters`` reaches.
        parameters: Where they belong.
        seed: Of the new weights.
    """
    inner = {id(p) for p in parameters.values()}
    for name, parameter in parameters.items():
        parameter.copy_(initial[name])
    device = next(iter(parameters.values())).device
    with RandomStream(seed, device):
        for submodule in module.modules():
            reset = getattr(submodule, "reset_parameters", None)
            own = [id(p) for p in submodule.parameters(recurse=False)]
            if callable(reset) and own and inner.issuperset(own):
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
