"""Tree of a ride: branches with their starts, ends and losses, kept in files so that nothing finished is lost."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_nested.files import replace_text

PATH_POINTS = 60  # points of a path that are kept
PATH_SIZE = 64  # parameters up to which paths are kept


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Node of the tree: a branching point, or the end of a run from beside one. Plain numbers, for JSON.

    Attributes:
        name: ``"3"`` for the first branching point of the fourth start and ``"3.1"`` for its next, ``"3+0"`` and
            ``"3-0"`` for the first direction from there, ``"3+0/-1"`` deeper.
        parent: Name of the node that it branched from; None for a root.
        start: Parameters at its beginning, one flat list per tensor.
        end: Parameters at its end; for a root the branching point.
        losses: Losses at ``end``, one per player.
        exponents: Finite-time exponents at a branching point, largest first; for a ridge, 1 if it ends at a saddle.
        directions: Unit perturbations that are branched along, flat; only of a branching point.
        behaviour: Numbers that tell solutions apart; the losses unless the rider was given something else.
        path: Parameters on the way, flat, thinned.
        finite: False if the run left the finite numbers.
    """

    name: str
    parent: str | None
    start: list[list[float]]
    end: list[list[float]]
    losses: list[float]
    exponents: list[float] = field(default_factory=list)
    directions: list[list[float]] = field(default_factory=list)
    behaviour: list[float] = field(default_factory=list)
    path: list[list[float]] = field(default_factory=list)
    finite: bool = True

    @classmethod
    def from_tensors(cls, start: Sequence[Tensor], end: Sequence[Tensor], **values: Any) -> Branch:
        """Make a branch of plain numbers; ``finite`` is read off its losses and end unless it is given."""
        finite = all(map(math.isfinite, values["losses"])) and all(bool(torch.isfinite(p).all()) for p in end)
        return cls(start=_lists(start), end=_lists(end), **{"finite": finite, **values})

    def tensors(self, like: Sequence[Tensor], which: str = "end") -> tuple[Tensor, ...]:
        """Return start or end as tensors of the shapes and dtypes of ``like``."""
        values = self.end if which == "end" else self.start
        pairs = zip(values, like, strict=True)
        return tuple(torch.tensor(v, dtype=p.dtype, device=p.device).reshape(p.shape) for v, p in pairs)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Group of branches that behave alike.

    Attributes:
        losses: Losses of the group's best branch.
        branches: Names, the best first.
        behaviour: Behaviour of the best branch.
    """

    losses: list[float]
    branches: list[str]
    behaviour: list[float]


@dataclass
class RideTree:
    """All branches of a ride, in the order in which they were made.

    Attributes:
        branches: Branches by name; roots hold branching points.
        tolerance: Distance of behaviours up to which two solutions count as one.
        folder: Folder that keeps the branches; None: keep them in memory.
        settings: Text on how a folder's branches were made; a ride with other settings refuses the folder.
    """

    tolerance: float = 1e-2
    folder: Path | None = None
    settings: str = ""
    branches: dict[str, Branch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        self.folder = Path(self.folder)
        kept = self.folder / "branches"
        kept.mkdir(parents=True, exist_ok=True)
        _check_settings(kept / "settings.txt", self.settings)
        for branch in map(_read, kept.glob("*.json")):
            self.branches[branch.name] = branch
        self._leave_out_orphans()

    def _ordered(self) -> list[Branch]:
        """Return branches by name, "2" before "10", whatever was finished first."""

        def key(branch: Branch) -> list[str | int]:
            return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", branch.name)]

        return sorted(self.branches.values(), key=key)

    def add(self, branches: Iterable[Branch]) -> None:
        """Add finished branches; each file appears whole or not at all."""
        for branch in branches:
            self.branches[branch.name] = branch
            if self.folder is not None:
                values = asdict(branch)
                file = self.folder / "branches" / f"{branch.name.replace('/', '_')}.json"
                replace_text(file, json.dumps({**values, "digest": _digest(values)}))

    def _leave_out_orphans(self) -> None:
        """Drop branches without their parent, as when its file was damaged and deleted; a ride makes both again."""
        left_out: list[str] = []
        while lost := [b.name for b in self.branches.values() if b.parent not in (None, *self.branches)]:
            for name in lost:
                del self.branches[name]
            left_out += lost
        if left_out:
            warnings.warn(
                f"A branch needs the file of the one it branched from. Got none for {', '.join(sorted(left_out))} "
                f"in {self.folder}: left out, and made again by the next ride into this folder.",
                stacklevel=4,
            )

    def __contains__(self, name: str) -> bool:
        return name in self.branches

    @property
    def roots(self) -> list[Branch]:
        """Branching points of the first level."""
        return [b for b in self._ordered() if b.parent is None]

    @property
    def leaves(self) -> list[Branch]:
        """Ends from which nothing branched."""
        parents = {b.parent for b in self.branches.values()}
        return [b for b in self._ordered() if b.name not in parents and b.parent is not None]

    def origin(self, name: str) -> str:
        """Return the name of the root that this branch descends from."""
        while (parent := self.branches[name].parent) is not None:
            name = parent
        return name

    def below(self, root: str) -> list[Branch]:
        """Return the leaves that descend from this root."""
        return [b for b in self.leaves if self.origin(b.name) == root]

    def solutions(self, branches: Iterable[Branch] | None = None) -> list[Solution]:
        """Return distinct ends, ranked by the sum of losses, the lowest first; runs that diverged are left out.

        Two branches are the same solution if no entry of their behaviours differs by more than ``tolerance``.
        """
        found: list[Solution] = []
        ends = [b for b in (self.leaves if branches is None else branches) if b.finite]
        for branch in sorted(ends, key=lambda b: (sum(b.losses), b.name)):
            for solution in found:
                pairs = zip(solution.behaviour, branch.behaviour, strict=True)
                if all(math.isfinite(a) and abs(a - b) <= self.tolerance for a, b in pairs):
                    solution.branches.append(branch.name)
                    break
            else:
                names = [branch.name]
                found.append(Solution(losses=branch.losses, branches=names, behaviour=branch.behaviour))
        return found

    def table(self) -> list[dict[str, Any]]:
        """Return one row of plain values per branch, for CSV and screens."""
        number = {name: i for i, s in enumerate(self.solutions()) for name in s.branches}
        return [
            {
                "branch": b.name,
                "parent": b.parent or "",
                **{f"loss_{i}": value for i, value in enumerate(b.losses)},
                "top_exponent": b.exponents[0] if b.exponents else "",
                "solution": number.get(b.name, ""),
                "finite": b.finite,
            }
            for b in self._ordered()
        ]


def _check_settings(file: Path, settings: str) -> None:
    """Write the settings of a new folder; raise ValueError if the folder has others."""
    if not file.exists():
        replace_text(file, settings)
        return
    before = file.read_text(encoding="utf-8")
    if before == settings:
        return
    if not before:
        # Versions before the files were written whole could leave this behind.
        raise ValueError(
            f"A ride's settings must be in {file}. Got an empty file, as an interruption can leave: delete it to go "
            "on with this ride, if the folder's branches have the same settings; otherwise give an empty folder."
        )
    raise ValueError(
        f"A ride must go on with the settings it began with. Got the folder {file.parent.parent} of another ride "
        f"({_difference(before, settings)}): give an empty folder, or the settings in {file}."
    )


def _read(file: Path) -> Branch:
    """Read a finished branch; files of versions before there were digests are taken as they are."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__} in place of named values")
        digest = values.pop("digest", None)
        if digest is not None and digest != _digest(values):
            raise ValueError("its numbers were changed after it was written")
        return Branch(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"A finished branch must be a file that this version wrote. Got {file}: {error}. Delete it to ride "
            "that branch again."
        ) from error


def _digest(values: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def _lists(tensors: Sequence[Tensor]) -> list[list[float]]:
    return [t.detach().flatten().tolist() for t in tensors]


def _difference(before: str, now: str) -> str:
    """Name the first setting in which two rides differ."""
    old, new = (dict(line.partition(": ")[::2] for line in text.splitlines()) for text in (before, now))
    for key in [*old, *new]:
        if old.get(key) != new.get(key):
            values = (str(d.get(key, "nothing")) for d in (old, new))
            shown = (v if len(v) <= 60 else f"{v[:60]}…" for v in values)
            return f"{key}: {' there, '.join(shown)} here"
    return "the same settings in another order"
