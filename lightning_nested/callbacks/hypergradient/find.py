"""One hypergradient of HypergradientCallback: the outer loss at its point, and the implicit derivative there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_nested.hypergradient.evaluation_point import placed_at
from lightning_nested.optim.step_dynamics import coupled_decay
from lightning_nested.trainer.inner_graph import InnerGraph
from lightning_nested.trainer.lightning import loss_scale, reduction
from lightning_nested.trainer.outer_loop import OuterLoop
from lightning_nested.trainer.outer_loss import evaluate_outer
from lightning_nested.trainer.outer_plan import OuterPlan


def find_hypergradient(
    trainer: Trainer,
    module: LightningModule,
    loop: OuterLoop,
    plan: OuterPlan,
    graph: InnerGraph,
    outer_loss: Callable[[Any], Tensor],
) -> None:
    """Find the hypergradient of an outer step and hold it in ``loop.outer``; count a step that fails as skipped.

    Args:
        trainer: Trainer of the run.
        module: Module that is trained.
        loop: Outer loop that gets the report.
        plan: Plan of the run: point, solver, decays.
        graph: Training losses of the inner step, with their graphs.
        outer_loss: Function from a batch of the outer loop to the outer loss with its graph.

    Raises:
        FloatingPointError: Too many successive outer steps failed.
    """
    outer, scale = loop.outer, loss_scale(trainer)
    assert loop.batches is not None
    inner_loss, parameters = graph.loss(), tuple(loop.parameters.values())
    try:
        weights = plan.look(trainer, graph, scale)
        with placed_at(parameters, weights):
            found = evaluate_outer(
                trainer,
                module,
                loop.batches,
                outer_loss,
                (*parameters, *outer.in_graph_tensors),
                scale=scale,
                caller=f"HypergradientCallback at inner step {loop.inner_steps}",
            )
        report = outer.compute(
            inner_loss,
            found,
            loop.parameters,
            curvature=graph.curvature(),
            reduce=reduction(trainer),
            fixed_decay=coupled_decay(trainer.optimizers[0]),
            inner_scale=scale,
            compare_identity=loop.logs(loop.outer_steps + 1),
            solver=plan.bound_solver(),
            weights=dict(zip(loop.parameters, weights, strict=True)),
            decay_factors=plan.decay_factors(loop.parameters),
            inspect=loop.check.inspect(inner_loss, loop.parameters, graph.again()),
        )
    except FloatingPointError as error:
        loop.skip(error)
    else:
        loop.keep(report)
