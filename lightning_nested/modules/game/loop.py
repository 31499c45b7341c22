"""Order in which the players of a game step, and the options of its loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_nested.arguments import at_least, checked, positive

Update = Literal["simultaneous", "alternating"]
Slot = tuple[tuple[str, ...], ...]
"""Steps on one batch in order, each with the names of the players that step together."""


@checked
@dataclass(frozen=True, kw_only=True)
class GameLoop:
    """Options of a game's loop: what the Trainer refuses in manual optimization, and the batches of steps.

    Args:
        accumulate_grad_batches: Batches per step of a player; an epoch's last step may have fewer.
        gradient_clip_val: Limit of a player's gradient; a dictionary gives each player its own; None: none.
        gradient_clip_algorithm: ``"norm"`` limits the norm of the player's gradient, ``"value"`` each entry.
        reuse_batch: In alternating updates, a player's first step uses the batch of the step before it, so
            that four discriminator steps and a generator step take four batches in place of five.
        consensus: γ of consensus optimization: in simultaneous updates each player descends
            L_i + (γ/2)‖ξ‖², where ξ is the joint gradient of all players, and so steps by ξ + γJᵀξ with the game's
            Jacobian J. Losses need graphs to every player, see ``joint_graph``, and second derivatives; a step takes
            about twice the time. Mescheder, Nowozin & Geiger (2017), NeurIPS, arXiv 1705.10461.

    Raises:
        ValueError: A value is out of range, or ``reuse_batch`` or ``consensus`` meets accumulation.
    """

    accumulate_grad_batches: int = 1
    gradient_clip_val: float | dict[str, float] | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    reuse_batch: bool = False
    consensus: float = 0.0  # γ

    def __post_init__(self) -> None:
        at_least(1, accumulate_grad_batches=self.accumulate_grad_batches)
        positive(gradient_clip_val=self.gradient_clip_val)
        if self.reuse_batch and self.accumulate_grad_batches > 1:
            raise ValueError(
                "reuse_batch=True lets two steps see one batch, which accumulation over several cannot do. Got "
                f"accumulate_grad_batches={self.accumulate_grad_batches}; set it to 1, or reuse_batch=False."
            )

        at_least(0, consensus=self.consensus)
        if self.consensus and self.accumulate_grad_batches > 1:
            raise ValueError(
                "consensus > 0 takes the norm of one batch's gradient, which accumulation over several is not. Got "
                f"accumulate_grad_batches={self.accumulate_grad_batches}; set it to 1, or consensus=0."
            )

    def clip_of(self, player: str) -> float | None:
        """Return the limit of a player's gradient."""
        clip = self.gradient_clip_val
        return clip.get(player) if isinstance(clip, dict) else clip


def schedule(
    players: Sequence[str], update: Update, steps_per_player: Mapping[str, int] | None, *, reuse_batch: bool
) -> list[Slot]:
    """Return the batches of one game update, each with the steps that use it.

    Args:
        players: Names in the order in which they step.
        update: ``"simultaneous"``: all step together; ``"alternating"``: one after the other.
        steps_per_player: Steps of each player in one update, where not 1; alternating only.
        reuse_batch: A player's first step joins the last step of the player before it.

    Raises:
        ValueError: An unknown name, a number below 1, or several steps in a simultaneous update.

    Example:
        >>> schedule(["d", "g"], "alternating", {"d": 2}, reuse_batch=False)
        [(('d',),), (('d',),), (('g',),)]
        >>> schedule(["d", "g"], "alternating", {"d": 2}, reuse_batch=True)
        [(('d',),), (('d',), ('g',))]
        >>> schedule(["d", "g"], "simultaneous", None, reuse_batch=False)
        [(('d', 'g'),)]
    """
    steps = dict(steps_per_player or {})
    unknown = [name for name in steps if name not in players]
    if unknown:
        raise ValueError(
            f"steps_per_player must name players. Got {unknown}; the players are {list(players)}."
        )
    check_steps(update, steps)
    if update == "simultaneous":
        return [(tuple(players),)]
    slots: list[Slot] = []
    for name in players:
        for k in range(steps.get(name, 1)):
            shared = slots.pop() if reuse_batch and k == 0 and slots else ()
            slots.append((*shared, (name,)))
    return slots


def check_steps(update: str, steps: Mapping[str, int], consensus: float = 0.0) -> None:
    """Refuse orders and numbers of steps that are wrong for any players."""
    if consensus and update != "simultaneous":
        raise ValueError(
            "consensus > 0 needs the gradients of all players at one point. Got update='alternating' with "
            f"consensus={consensus}; use update='simultaneous'."
        )
    for name, k in steps.items():
        if k < 1:
            raise ValueError(
                f"steps_per_player must be at least 1 for every player. Got {k} for {name!r}; a player that never "
                "steps is none: leave it out of players()."
            )
        if k > 1 and update == "simultaneous":
            raise ValueError(
                f"In a simultaneous update every player steps once. Got steps_per_player={dict(steps)}; use "
                "update='alternating'."
            )
