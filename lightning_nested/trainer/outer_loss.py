"""One evaluation of the outer loss, as a validation would see it and without trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_nested.trainer.isolation import evaluation_mode, validation_stage, without_trace
from lightning_nested.trainer.lightning import transfer
from lightning_nested.trainer.outer_batches import OuterBatches


def evaluate_outer(
    trainer: Trainer,
    module: LightningModule,
    batches: OuterBatches,
    loss: Callable[[Any], Tensor],
    tensors: Sequence[Tensor] = (),
    *,
    scale: float = 1.0,
    attributes: bool = True,
) -> Tensor:
    """The outer loss of the next outer batch, in evaluation mode and the Trainer's validating stage.

    Args:
        trainer: Its hooks move the batch; its precision applies.
        module: Left as it was: modes, buffers, metrics, attributes, logs, random numbers.
        batches: Where the batch and the loss's own random numbers come from.
        loss: From a batch to a scalar with its graph.
        tensors: The loss is differentiated with respect to these while the module still is in evaluation mode:
            ``torch.utils.checkpoint`` runs a forward again inside the backward pass, which would otherwise meet
            dropout and batch statistics. Empty: the graph is returned as it is.
        scale: Factor on the loss while it is differentiated, so that fp16 derivatives do not vanish.
        attributes: Whether plain attributes of the module are put back: ``loss`` is not written for this use.

    Returns:
        A scalar with a graph to ``tensors``.
    """
    batch = batches.next()
    with (
        batches.loss_stream(),
        validation_stage(trainer),
        evaluation_mode(module),
        without_trace(module, trainer, attributes=attributes),
    ):
        batch = transfer(trainer, module, batch)
        with trainer.precision_plugin.val_step_context():
            value = loss(batch)
        if not tensors or value.numel() != 1:
            return value
        with torch.autocast(value.device.type, enabled=False):  # derivatives are taken outside, as always
            return differentiated(value, tuple(tensors), scale)


def differentiated(loss: Tensor, tensors: tuple[Tensor, ...], scale: float = 1.0) -> Tensor:
    """``loss`` with its derivatives taken already: its graph holds them and nothing else.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> float(torch.autograd.grad(differentiated(x**2, (x,)), x)[0])
    6.0
    """
    gradients = torch.autograd.grad(
        loss * scale if scale != 1.0 else loss, tensors, allow_unused=True, retain_graph=scale != 1.0
    )
    if scale != 1.0:
        gradients = tuple(None if g is None else g / scale for g in gradients)
        if not all(g is None or bool(g.isfinite().all()) for g in gradients):  # the scale was too much
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    value: Tensor = _Differentiated.apply(loss.detach(), gradients, *tensors)
    return value


class _Differentiated(torch.autograd.Function):
    """A scalar whose derivatives are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = outer
        return None, None, *(None if g is None else factor.to(g.dtype) * g for g in ctx.gradients)
