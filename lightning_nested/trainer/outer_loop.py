"""Parts of the outer loop that callbacks and modules share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_nested.hyperparameters import OuterReport
from lightning_nested.trainer.lightning import logger_step
from lightning_nested.trainer.random_stream import RandomStream


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
    step = logger_step(trainer)
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
