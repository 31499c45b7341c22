"""Which momentum the players of a running game get from its measured spectrum, and why not where they get none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_nested.callbacks.game_momentum import (
    ADAPT_LIMIT,
    EXACT_LIMIT,
    JointStep,
    better_momenta,
    better_momentum,
)
from lightning_nested.callbacks.step_dynamics import (
    Momentum,
    StepDynamics,
    StepJacobian,
    has_complex_momentum,
)

if TYPE_CHECKING:
    from lightning_nested.callbacks.game_spectrum import MeasuredSpectrum


def optimizers_of(module: Any) -> dict[str, torch.optim.Optimizer]:
    """The optimizer of each player of a running :class:`GameModule`."""
    return {name: player.optimizer.optimizer for name, player in module.running_players.items()}


def single_steps(module: Any) -> bool:
    """Whether every player takes one step in an update."""
    return max(module.steps_per_player.values(), default=1) == 1


def joint_step(module: Any, dynamics: Mapping[str, StepDynamics], operator: StepJacobian) -> JointStep | None:
    """The players' joint step; None where the game is large, or an update is no momentum."""
    momenta = [momentum for each in dynamics.values() for momentum in each.momenta]
    if sum(operator.sizes) > EXACT_LIMIT or any(m.kind != "momentum" for m in momenta):
        return None
    counts = [p.numel() for p in operator.like]
    momentum, phase = np.repeat([(m.momentum, m.phase) for m in momenta], counts, axis=0).T
    steps = tuple(module.steps_per_player.get(name, 1) for name in dynamics)
    return JointStep(
        matrix=operator.dense().detach().to("cpu", torch.float64).numpy(),
        sizes=operator.sizes,
        steps=steps if module.update == "alternating" else None,
        momentum=momentum,
        phase=phase,
    )


def adapts_each_player(step: JointStep | None) -> bool:
    """Whether there is a joint step whose eigenvalues can be had many times."""
    return step is not None and len(step.matrix) <= ADAPT_LIMIT


def adapted_momenta(
    module: Any, measured: MeasuredSpectrum, step: JointStep | None, **limits: Any
) -> dict[str, Momentum]:
    """The next momentum of every player that may have another one.

    Args:
        module: The running :class:`GameModule`.
        measured: Its spectrum.
        step: Its joint step if that is known.
        **limits: ``max_momentum`` and ``max_change`` of :func:`better_momenta`.

    Raises:
        ValueError: There is no predicted rate to go by, or no player's momentum can be set; it says why.
    """
    optimizers = optimizers_of(module)
    movable = {
        name: momentum
        for name, momentum in measured.momenta.items()
        if momentum is not None and momentum.kind == "momentum" and has_complex_momentum(optimizers[name])
    }
    if movable and step is not None and adapts_each_player(step):
        places = {name: i for i, name in enumerate(optimizers)}
        better = better_momenta(step, {places[name]: m for name, m in movable.items()}, **limits)
        return {name: better[places[name]] for name in movable}
    common = measured.momentum
    if common is None or len(movable) < len(optimizers) or not single_steps(module):
        raise ValueError(_why_not(module, measured, movable))
    one = better_momentum(measured.eigenvalues, common, alternating=measured.alternating, **limits)
    return dict.fromkeys(movable, one)


def _why_not(module: Any, measured: MeasuredSpectrum, movable: Mapping[str, Momentum]) -> str:
    if any(momentum is not None and momentum.kind != "momentum" for momentum in measured.momenta.values()):
        return "an optimizer's update is another one, as that of ComplexAdam with debias=True and a phase is"
    if not movable:
        return "no player has one momentum that may change; its groups must agree, and ComplexAdam have debias=False"
    small = f"which only the joint step of up to {ADAPT_LIMIT} numbers knows"
    if not single_steps(module):
        return f"players take several steps in an update (steps_per_player={dict(module.steps_per_player)}), {small}"
    return f"the players, or groups of one, differ in momentum, phase or kind of optimizer, {small}; give all the same"


def without_complex_momentum(optimizers: Mapping[str, torch.optim.Optimizer]) -> str:
    """The players that cannot be adapted, for a warning; empty if all can.

    Raises:
        MisconfigurationException: No player can.
    """
    without = [
        f"{type(optimizer).__name__} for {name!r}"
        for name, optimizer in optimizers.items()
        if "phase" not in optimizer.param_groups[0]
    ]
    if len(without) == len(optimizers):
        raise MisconfigurationException(
            "adapt=True sets momentum and phase of ComplexSGD and ComplexAdam. "
            f"Got {', '.join(without)}; use one of them, or adapt=False."
        )
    return ", ".join(without)
