"""What outer steps do where the user leaves it open, by what is tuned."""

from __future__ import annotations

from functools import partial

from lightning_nested.hypergradient.evaluation_point import Current, EvaluationPoint, LookAhead
from lightning_nested.hyperparameters import OuterStep
from lightning_nested.hyperparameters.outer_optimizer import OuterOptimizer, planned_outer_optimizer
from lightning_nested.hyperparameters.shared_adam import default_adam
from lightning_nested.linalg.solvers.base import InverseSolver
from lightning_nested.linalg.solvers.from_run import KroneckerFactored
from lightning_nested.linalg.solvers.given import AnySolver, Identity, as_solver

# Longest outer step of rates and momenta alone. Together they can move log(rate) by 16, but noise turns many of them.
_OPTION_RATE = 0.4
# Shares of a run before the first outer step.
_WARMUP, _OPTION_WARMUP = 0.1, 0.7


def only_options(outer: OuterStep) -> bool:
    """Return True if nothing but options of the inner optimizer is tuned."""
    return not (outer.in_graph or outer.decays)


def warmup_share(outer: OuterStep) -> float:
    """Return the share of a run before its first outer step: a learning rate that is tuned early falls too early."""
    return _OPTION_WARMUP if only_options(outer) else _WARMUP


def tunes_example_weights(outer: OuterStep) -> bool:
    """Return True if a hyperparameter has an entry for each training example."""
    return any(h.moves_one_batch for h in outer.in_graph)


def needs_few_steps(outer: OuterStep, train_batches: int) -> bool:
    """Return True if a hundred outer steps of a run are enough, with so many further training batches in each.

    Without any each outer step moves the weights of one batch's examples; a rate is to follow the run.
    """
    return not only_options(outer) and (train_batches > 0 or not tunes_example_weights(outer))


def point_and_solver(
    outer: OuterStep, point: EvaluationPoint | None, solver: AnySolver, *, in_shards: bool = False
) -> tuple[EvaluationPoint, InverseSolver]:
    """Return where the outer loss is differentiated, and the solver: ``LookAhead()`` and ``KroneckerFactored()``.

    Weights of examples or their groups alone are tuned at the current weights, with a damping relative to the
    curvature. A look ahead is for what all examples have in common, and that does not change their order. In shards
    there is neither: the defaults are ``Current()`` and ``Neumann()``. Options of the optimizer alone need neither.
    """
    if only_options(outer):
        return Current(), Identity()
    if in_shards:
        return Current() if point is None else point, as_solver(solver)
    alone = all(h.weighs_examples for h in outer.hyperparameters)
    if point is None and solver is None and alone:
        return Current(), KroneckerFactored(relative=0.3)
    point = point if point is not None else LookAhead()
    if solver is None and isinstance(point, LookAhead):
        return point, KroneckerFactored()
    return point, as_solver(solver)


def planned_optimizer(outer: OuterStep, rate: float) -> OuterOptimizer:
    """Return the function that makes the outer optimizer of a planned run, whose first rate is ``rate``."""
    if only_options(outer):
        return partial(default_adam, outer.decays, lr=min(_OPTION_RATE, 2 * rate))
    if tunes_example_weights(outer) and not any(d.per == "parameter" for d in outer.decays):
        return partial(planned_outer_optimizer, rate=rate)
    return partial(default_adam, outer.decays, lr=rate)
