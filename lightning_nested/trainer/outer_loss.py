"""Evaluate the outer loss as a validation would, without side effects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_nested.linalg.first_derivatives import first_derivative, knowing
from lightning_nested.linalg.graph import without_hooks
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
    caller: str | None = None,
) -> Tensor:
    """Return the outer loss of the next outer batch, in evaluation mode and the Trainer's validating stage.

    Args:
        trainer: Trainer whose hooks move the batch and whose precision applies.
        module: Module that is evaluated: its modes and all that can be reached from it are restored.
        batches: Source of the batch and of the loss's own random numbers.
        loss: Function from a batch to a scalar with its graph.
        tensors: The loss is differentiated with respect to these while the module still is in evaluation mode:
            ``torch.utils.checkpoint`` runs a forward again inside the backward pass, which would otherwise meet
            dropout and batch statistics. Empty: the graph is returned as it is.
        scale: Factor on the loss while it is differentiated, so that fp16 derivatives do not vanish.
        attributes: Whether plain attributes are restored too: ``loss`` may be a ``validation_step`` that counts.
        caller: Who asks, and when; for exceptions that come out of ``loss``.

    Returns:
        A scalar with a graph to ``tensors``.
    """
    with batches.apart():
        batch = batches.next()

        def evaluate() -> Tensor:
            moved = transfer(trainer, module, batch)
            with trainer.precision_plugin.val_step_context():
                return loss(moved)

        if caller is not None:
            caller = (
                f"Called by {caller}, for the outer loss of batch {batches.index} of its data: in evaluation mode, "
                "with gradients, and outside the Trainer's validation, whose hooks may not have run."
            )
        with (
            batches.loss_stream().replay(),
            validation_stage(trainer),
            evaluation_mode(module),
            without_trace(module, trainer, evaluate, attributes=attributes, caller=caller),
        ):
            value = evaluate()
            if not tensors or value.numel() != 1:
                return value
            return differentiated(value, tuple(tensors), scale, evaluate)


def differentiated(
    loss: Tensor, tensors: tuple[Tensor, ...], scale: float = 1.0, again: Callable[[], Tensor] | None = None
) -> Tensor:
    """Return ``loss`` with its derivatives taken already: its graph holds them and nothing else.

    Args:
        loss: Scalar with its graph, which is freed.
        tensors: What it is differentiated with respect to.
        scale: Factor on the loss meanwhile.
        again: Evaluates the loss once more where that factor was too large.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> float(torch.autograd.grad(differentiated(x**2, (x,)), x)[0])
    6.0
    """

    def gradients(of: Tensor) -> tuple[Tensor | None, ...]:
        # Derivatives are taken outside autocast, as in any training. No graph is kept: a compiled one cannot be.
        with without_hooks(tensors), torch.autocast(of.device.type, enabled=False):
            return first_derivative(of, tensors)

    found = gradients(loss * scale if scale != 1.0 else loss)
    if scale != 1.0:
        found = tuple(None if g is None else g / scale for g in found)
        if again is not None and not all(g is None or bool(g.isfinite().all()) for g in found):
            found = gradients(again())
    value: Tensor = _Differentiated.apply(loss.detach(), found, *tensors)
    return knowing(value, tensors, found)


class _Differentiated(torch.autograd.Function):
    """Scalar whose derivatives are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = outer
        return None, None, *(None if g is None else factor.to(g.dtype) * g for g in ctx.gradients)
