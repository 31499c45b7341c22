"""One implicit hypergradient of a run: the outer loss at its point, and the derivative through the training there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_nested.hypergradient import Curvature, DoubleBackwardError
from lightning_nested.hypergradient.evaluation_point import placed_at
from lightning_nested.hypergradient.inner_curvature import Loss
from lightning_nested.hyperparameters import OuterReport
from lightning_nested.optim.step_dynamics import coupled_decay
from lightning_nested.trainer.inner_graph import InnerGraph
from lightning_nested.trainer.isolation import without_trace
from lightning_nested.trainer.lightning import loss_scale, reduction
from lightning_nested.trainer.outer_plan import OuterPlan
from lightning_nested.trainer.self_check import SelfCheck
from lightning_nested.trainer.shards import gathered_after
from lightning_nested.trainer.training_batches import TrainingBatches


def find_hypergradient(
    module: LightningModule,
    plan: OuterPlan,
    graph: InnerGraph,
    parameters: Mapping[str, nn.Parameter],
    evaluate_outer: Callable[[tuple[Tensor, ...]], Tensor],
    *,
    check: SelfCheck,
    full_report: bool = False,
    train_batches: TrainingBatches | None = None,
) -> OuterReport:
    """Find the hypergradient of an outer step, and hold it in ``plan.outer``.

    Args:
        module: Module that is trained.
        plan: Plan of the run: hyperparameters, point, solver, decays.
        graph: Training losses of the inner step, with their graphs.
        parameters: Inner parameters by name.
        evaluate_outer: Returns the outer loss of the next outer batch at the weights that the parameters have then,
            with its graph to the tensors that it is given.
        check: Checks of the first outer step.
        full_report: Whether to find what only logs need: ``identity_cosine``, ``inner_gradient_norm``.
        train_batches: Training batches that the mixed derivative is taken on, in place of ``graph``.

    Raises:
        FloatingPointError: A value is not finite, or there is no positive curvature.
    """
    trainer, outer, mixed = module.trainer, plan.outer, None
    if train_batches is not None:
        mixed = train_batches.mixed(module, parameters, graph.losses[0], outer.in_graph)
    # One process may need an evaluation that another does not, and would wait for the other's statistics.
    waits = check.is_due and any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())

    def otherwise(error: DoubleBackwardError) -> tuple[Curvature, Loss]:
        found = graph.take_differences(error)
        check.replaced(error)
        return found

    scale, inner_loss, tensors = loss_scale(trainer), graph.loss(), tuple(parameters.values())
    # torch.utils.checkpoint runs the forward again in every product, and would move buffers. A solver from the run
    # makes none, and all else that runs the user's code has an isolation of its own.
    solver = plan.solver
    products = bool(outer.in_graph) or solver.needs_operator or not solver.needs_statistics
    isolated: AbstractContextManager[object] = (
        without_trace(module, trainer, attributes=False) if products else nullcontext()
    )
    with isolated, plan.paused(), gathered_after(trainer, module):
        weights = plan.look(trainer, graph, scale)
        with placed_at(tensors, weights) if plan.looks_ahead else nullcontext():
            outer_loss = evaluate_outer((*tensors, *outer.in_graph_tensors))
        return outer.compute(
            inner_loss,
            outer_loss,
            parameters,
            curvature=graph.curvature(),
            reduce=reduction(trainer),
            fixed_decay=coupled_decay(trainer.optimizers[0]),
            inner_scale=scale,
            compare_identity=full_report,
            measure_gradient=full_report,
            solver=plan.bound_solver(),
            weights=dict(zip(parameters, weights, strict=True)),
            decay_factors=plan.decay_factors(parameters),
            mixed=mixed,
            otherwise=otherwise,
            inspect=check.inspect(
                inner_loss, parameters, None if waits else graph.again(), outer.graph_labels()
            ),
        )
