"""The decay that a run gives the unit of: one that shrinks a weight without gradient by a factor e until the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_nested.optim.step_dynamics import decoupled_rates, has_long_run, inverse_rates


def peak_rates(
    optimizer: Optimizer, schedulers: Iterable[LRScheduler], first: Sequence[float], total: int
) -> list[float]:
    """Return the largest learning rate of each parameter group in the run, as far as it can be known beforehand.

    Args:
        optimizer: The inner optimizer.
        schedulers: Its schedulers.
        first: Rates of the groups before the first step: a warm-up that is written into ``optimizer_step`` comes later.
        total: Inner steps of the run.
    """
    groups = optimizer.param_groups
    # Groups that were added since have no first rate.
    starts = [*first, *[0.0] * len(groups)][: len(groups)]
    peaks = [
        max(float(g["lr"]), float(g.get("max_lr", 0.0)), rate) for g, rate in zip(groups, starts, strict=True)
    ]
    for scheduler in schedulers:
        known = [float(group.get("initial_lr", 0.0)) for group in groups]
        if isinstance(scheduler, LambdaLR):
            # Its base rate may be nominal: 1.0 in Noam's schedule.
            times = range(0, total, max(1, total // 100))
            pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            known = [max(float(base) * float(factor(t)) for t in times) for base, factor in pairs]
        elif hasattr(scheduler, "max_lrs"):
            known = [float(rate) for rate in scheduler.max_lrs]
        peaks = [max(peak, other) for peak, other in zip(peaks, known, strict=False)]
    return peaks


def measured_units(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], total: int, peaks: Sequence[float]
) -> dict[str, float]:
    """Return one unit of decay for each parameter whose steps are known, see :meth:`WeightDecay.fit_to_run`.

    Left out are parameters whose optimizer's long-run step is not known, and those that had no gradient yet. A
    decoupled decay acts by the learning rate alone, whatever the optimizer's steps are.
    """
    decoupled = decoupled_rates(optimizer)
    inverse = dict(
        zip(parameters, inverse_rates(optimizer, tuple(parameters.values()), float(total)), strict=True)
    )
    names = {id(p): name for name, p in parameters.items()}
    units = {}
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        now = float(group["lr"])
        for p in group["params"]:
            name = names.get(id(p))
            if name is None or not (peak > 0 and now > 0):
                continue
            if id(p) in decoupled:
                units[name] = 1 / (peak * total)
            elif has_long_run(optimizer, group, p):
                # Warm-ups begin far below the rate that most of the run has.
                units[name] = float(inverse[name].double().mean()) * now / (peak * total)
    return {name: unit for name, unit in units.items() if math.isfinite(unit) and unit > 0}
