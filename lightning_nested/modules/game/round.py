"""Position in a round of a game: in the batches of one game update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_nested.modules.game.loop import Slot


class Round:
    """Slots of one game update, and the number of them that are done.

    Attributes:
        slots: See :func:`schedule`.
        position: Slots that are done.

    Example:
        >>> round = Round([(("d",),), (("g",),)])
        >>> round.advance()
        >>> round.slot, round.is_last
        ((('g',),), True)
    """

    def __init__(self, slots: list[Slot] | None = None) -> None:
        self.slots: list[Slot] = slots or []
        self.position = 0

    @property
    def slot(self) -> Slot:
        """The current slot."""
        return self.slots[self.position]

    @property
    def is_last(self) -> bool:
        """True if the current slot ends the round."""
        return self.position + 1 == len(self.slots)

    def advance(self) -> None:
        """Go to the next slot; after the last one, to the first."""
        self.position = (self.position + 1) % len(self.slots)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the slots, as lists."""
        return {"position": self.position, "schedule": self._plain()}

    def resume(self, saved: Mapping[str, Any]) -> bool:
        """Go to the position in a game's checkpoint; return False, and start again, if that is one in other rounds."""
        now = self._plain()
        then = saved.get("schedule", now)
        if then == now:
            self.position = saved["position"] % len(self.slots)
            return True
        if saved["position"] or saved["sums"]["count"]:
            rank_zero_warn(
                "The checkpoint is from the middle of a round in which players step in another order or number "
                f"({then}; now {now}): the round starts again."
            )
        self.position = 0
        return False

    def _plain(self) -> list[list[list[str]]]:
        return [[list(names) for names in slot] for slot in self.slots]
