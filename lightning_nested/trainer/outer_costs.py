"""What an outer step costs in a run, and how many further training batches it can afford."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader

from lightning_nested.linalg.processes import agreed_number
from lightning_nested.trainer.lightning import reduction
from lightning_nested.trainer.outer_defaults import only_options, tunes_example_weights
from lightning_nested.trainer.outer_loop import OuterLoop
from lightning_nested.trainer.pace import PASS, affordable_batches, batch_ratio

if TYPE_CHECKING:
    from lightning_nested.trainer.outer_plan import OuterPlan


def outer_step_cost(plan: OuterPlan, trainer: Trainer, loop: OuterLoop, batches: int) -> float:
    """Return the cost of an outer step, in gradients of an inner step of so many batches.

    The further training batches of ``loop`` must have begun.
    """
    count = loop.train_batches.count
    # An inner gradient with its graph and a mixed product.
    graph = plan.solver.needs_operator or (bool(plan.outer.in_graph) and not count)
    return _cost_without(plan, trainer, loop, batches) + 2.5 * graph + PASS * count / batches


def begin_train_batches(plan: OuterPlan, trainer: Trainer, loop: OuterLoop, batches: int) -> None:
    """Begin the stream of further training batches: as many an outer step as asked for, or as the budget allows."""
    wanted = loop.train_batches.wanted if plan.outer.in_graph else 0
    # Batch sizes are read from the loaders, which the Trainer itself makes after on_fit_start only.
    trainer.fit_loop.setup_data()
    if wanted is not None:
        count = int(min(wanted, trainer.num_training_batches))
    elif (
        tunes_example_weights(plan.outer)
        and not plan.solver.needs_operator
        and loop.check.may_repeat(trainer.lightning_module)
    ):
        count = affordable_batches(
            trainer,
            cost=_cost_without(plan, trainer, loop, batches),
            overhead=plan.overhead,
            every_n_steps=plan.every_n_steps,
            accumulate=plan.accumulate,
            batches=batches,
        )
    else:
        count = 0
    loop.train_batches.start(trainer, count)


def batches_in_round(trainer: Trainer, loop: OuterLoop) -> int | None:
    """Return the outer batches in a round over their data, the same on all processes; None: unknown."""
    try:
        size = 0.0 if loop.batches is None else float(len(loop.batches.loader))
    except (TypeError, NotImplementedError):  # a stream
        size = 0.0
    # Loaders of the user's own may differ in length.
    return (
        round(agreed_number(torch.tensor(size, device=trainer.strategy.root_device), reduction(trainer)))
        or None
    )


def _cost_without(plan: OuterPlan, trainer: Trainer, loop: OuterLoop, batches: int) -> float:
    """Return the cost of an outer step without graph and further batches; the Trainer's loaders are set up."""
    inner = next(iter(CombinedLoader(trainer.train_dataloader).flattened), None)
    outer = None if loop.batches is None else loop.batches.loader
    # The outer gradient; the solver's products; forward passes and observations of the look ahead.
    ratio = batch_ratio(inner, outer) / batches
    options = plan.outer.options
    if not options:
        return ratio + plan.solver.products + plan.looks_ahead
    # An outer gradient of their own, and about as much as a gradient for its batch and the derivative of a step; after
    # the first step of the horizon, a graph and a product for each number.
    count = sum(option.count for option in options)
    own = 1 + ratio + (max(option.horizon for option in options) - 1) * (1 + count)
    return own if only_options(plan.outer) else own + ratio + plan.solver.products + plan.looks_ahead
