"""The hypergradient of one outer step of HypergradientCallback, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nested.linalg.graph import DoubleBackwardError, explain_double_backward
from lightning_nested.trainer.find_hypergradient import find_hypergradient
from lightning_nested.trainer.forecast import expect_loss
from lightning_nested.trainer.inner_graph import InnerGraph
from lightning_nested.trainer.lightning import loss_scale, skips_step
from lightning_nested.trainer.option_tuner import OptionTuner
from lightning_nested.trainer.outer_loop import OuterLoop
from lightning_nested.trainer.outer_loss import evaluate_outer
from lightning_nested.trainer.outer_memory import tell_graphs
from lightning_nested.trainer.outer_plan import OuterPlan
from lightning_nested.trainer.self_check import SelfCheck


def backward_again(backward: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any) -> None:
    """Run a module's ``backward`` so that the last batch of a step can differentiate the graph once more.

    Raises:
        DoubleBackwardError: The graph of a compiled network cannot be kept.
    """
    with explain_double_backward():
        backward(loss, *args, **{**kwargs, "retain_graph": True})


def backward_or_differences(
    module: LightningModule,
    graph: InnerGraph,
    check: SelfCheck,
    backward: Callable[..., None],
    loss: Tensor,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Run :func:`backward_again`; where the graph cannot be kept, let differences replace second derivatives.

    Args:
        module: Module that is trained.
        graph: Losses of the step, which are observed at the first outer step of a fit.
        check: Checks of the first outer step.
        backward: The module's own.
        loss: Loss of one of the accumulated batches.
        *args: Of ``backward``.
        **kwargs: Of ``backward``.

    Raises:
        DoubleBackwardError: The graph cannot be kept, and differences are not to be had.
    """
    if not check.is_due:
        backward_again(backward, loss, *args, **kwargs)
        return
    # A pass that breaks off has filled some of them.
    parameters = [p for p in module.parameters() if p.requires_grad]
    kept = [None if p.grad is None else p.grad.clone() for p in parameters]
    try:
        backward_again(backward, loss, *args, **kwargs)
    except DoubleBackwardError as error:
        graph.take_differences(error)
        check.replaced(error)
        with torch.no_grad():
            for p, gradient in zip(parameters, kept, strict=True):
                if gradient is None or p.grad is None:
                    p.grad = gradient
                else:
                    p.grad.copy_(gradient)
        backward(loss, *args, **kwargs)


def before_backward(trainer: Trainer, plan: OuterPlan, graph: InnerGraph, loss: Tensor) -> None:
    """Look at a training loss whose backward pass comes.

    Args:
        trainer: Trainer of the run.
        plan: Plan of the run, whose statistics expect the loss.
        graph: Graphs of its outer steps.
        loss: Loss of a batch with its graph.
    """
    expect_loss(plan.forecast, loss, trainer.accumulate_grad_batches)
    tell_graphs("HypergradientCallback", trainer, plan, graph, loss)


def try_outer_step(
    module: LightningModule,
    loop: OuterLoop,
    plan: OuterPlan,
    graph: InnerGraph,
    outer_loss: Callable[[Any], Tensor],
    options: OptionTuner,
) -> None:
    """Find the hypergradient of an outer step and hold it in ``loop.outer``; count a step that fails as skipped.

    Args:
        module: Module that is trained.
        loop: Outer loop that gets the report.
        plan: Plan of the run: point, solver, decays.
        graph: Training losses of the inner step, with their graphs.
        outer_loss: Function from a batch of the outer loop to the outer loss with its graph.
        options: Tuned options of the optimizer, whose derivatives are those of a further outer batch.

    Raises:
        FloatingPointError: Too many successive outer steps failed.
    """
    assert loop.batches is not None
    caller = f"HypergradientCallback at inner step {loop.inner_steps}"
    scale = loss_scale(module.trainer)
    evaluate = partial(
        evaluate_outer, module.trainer, module, loop.batches, outer_loss, scale=scale, caller=caller
    )
    try:
        if loop.outer.in_graph or loop.outer.decays:
            report = find_hypergradient(
                module,
                plan,
                graph,
                loop.parameters,
                evaluate,
                check=loop.check,
                full_report=loop.logs(loop.outer_steps + 1),
                train_batches=loop.train_batches,
            )
        if loop.outer.options:
            with plan.paused():
                found = options.hypergradient(evaluate, module.trainer)
            report = report if loop.outer.in_graph or loop.outer.decays else found
    except FloatingPointError as error:
        options.clear()
        # Some derivatives may be held already.
        loop.outer.discard()
        loop.skip(error)
    else:
        loop.keep(report)


def prepare_step(
    trainer: Trainer,
    optimizer: Optimizer,
    plan: OuterPlan,
    parameters: Mapping[str, nn.Parameter],
    options: OptionTuner,
) -> None:
    """Give the coming inner step its tuned options and decays, and the statistics its gradient.

    Args:
        trainer: Trainer of the run.
        optimizer: Inner optimizer.
        plan: Plan of the run.
        parameters: Inner parameters by name.
        options: Tuned options of the optimizer.
    """
    # A fused optimizer divides by the scale of fp16 itself, after this.
    scale = loss_scale(trainer)
    held = scale if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
    options.put()
    options.shrink(trainer, parameters)
    if not skips_step(trainer, optimizer):
        plan.add_decays(parameters, held)
    plan.observe_gradient(trainer, scale=held, hook_scale=scale)
    options.advance(trainer, parameters)


def give_back_saved(checkpoint: dict[str, Any], plan: OuterPlan, options: OptionTuner) -> None:
    """Give a checkpoint the optimizer's own decays and options, wherever in a step it is written."""
    plan.own_decay.give_back_saved(checkpoint)
    options.give_back_saved(checkpoint)
