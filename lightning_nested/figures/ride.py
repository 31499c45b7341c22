"""The figure of a ride: the exponent field with the runs on it, and where the branches ended."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.dynamics import Branch, Branching, RideTree, update_map
from lightning_nested.dynamics.riders.branching import FiniteTime
from lightning_nested.games import Game
from lightning_nested.linalg.vectors import Vector, flatten, unflatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_nested.dynamics import UpdateMap


# Dark, so that they stand out on a field of red and blue; the most frequent solution first.
_COLOURS = ("#111111", "#1b9e3f", "#e6a100", "#7b3fb5", "#00a6a6", "#d1499b")
_OTHER = "#8a8f98"
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 9.5,
}
_LARGEST = 64  # parameters up to which the field is drawn
_LEVELS = 21  # of the field, odd: white is around zero


def ride_figure(
    tree: RideTree,
    game: Game,
    starts: Sequence[Vector],
    optimizer: Callable[[list[Tensor]], Optimizer],
    branching: Branching,
    *,
    resolution: int = 49,
) -> Figure:
    """Draw the field of the top finite-time exponent with runs of the tree, and the losses at the ends of all.

    With two parameters the axes are the parameters, and every run is drawn. With more, the field lies on the plane
    through one branching point along its two most separating directions: that point whose runs part most evenly between
    two solutions. Drawn are the runs that begin in this plane, projected onto it.

    Args:
        tree: A ride.
        game: Its game.
        starts: Its starts.
        optimizer: Its optimizer.
        branching: Horizon of the exponents.
        resolution: Points a side.
    """
    like = tuple(starts[0])
    colours = _colours(tree)
    with mpl.rc_context(_STYLE):
        field = 2 <= sum(p.numel() for p in like) <= _LARGEST and any(r.finite for r in tree.roots)
        figure = Figure(figsize=(13.5 if field else 7.0, 5.6), dpi=100, facecolor="white")
        axes = figure.subplots(
            1, 2 if field else 1, squeeze=False, width_ratios=[1.15, 1] if field else None
        )[0]
        if field:
            _field(axes[0], tree, game, like, optimizer, branching, resolution, colours)
        _ends(axes[-1], tree, colours)
        figure.tight_layout(w_pad=2.5)
    return figure


def _colours(tree: RideTree) -> dict[str, str]:
    """Of every branch: that of its solution."""
    solutions = sorted(tree.solutions(), key=lambda s: -len(s.branches))
    return {
        name: _COLOURS[i] if i < len(_COLOURS) else _OTHER
        for i, s in enumerate(solutions)
        for name in s.branches
    }


def _field(
    axes: Axes,
    tree: RideTree,
    game: Game,
    like: Vector,
    optimizer: Callable[[list[Tensor]], Optimizer],
    branching: Branching,
    resolution: int,
    colours: dict[str, str],
) -> None:
    training = update_map(optimizer([p.clone() for p in like]), game.losses)
    root, origin, basis = _plane(tree, training, like, branching)
    whole = len(origin) == 2
    roots = [r for r in tree.roots if r.finite] if whole else [root]
    points, begins = (
        torch.stack([flatten(r.tensors(like, end)) - origin for r in roots]) @ basis.mT
        for end in ("end", "start")
    )
    runs = {}
    for r, point in zip(roots, points, strict=True):
        for b in tree.below(r.name):
            if b.path and b.finite and (whole or _in_plane(b, r)):
                path = (torch.tensor(b.path, dtype=origin.dtype) - origin) @ basis.mT
                runs[b.name] = torch.cat([point[None], path])
    # What lies around the places where runs begin; they leave towards infinite logits.
    seen = torch.cat([points, begins, *(run[:2] for run in runs.values())])
    low, high = seen.amin(0), seen.amax(0)
    margin = 0.25 * (high - low).clamp_min(4.0)
    low, high = low - margin, high + margin
    xs, ys = (
        torch.linspace(float(a), float(b), resolution, dtype=origin.dtype)
        for a, b in zip(low, high, strict=True)
    )
    flat = origin + torch.cartesian_prod(xs, ys) @ basis
    grid = tuple(torch.stack(p) for p in zip(*(unflatten(f, like) for f in flat), strict=True))
    with torch.no_grad():
        values = FiniteTime(training, grid, branching).exponents(grid)[:, 0].reshape(resolution, resolution)
    shown = values[torch.isfinite(values)].abs()
    bound = float(shown.quantile(0.995)) if len(shown) else 1.0
    levels = torch.linspace(-bound or -1.0, bound or 1.0, _LEVELS + 1).tolist()
    mesh = axes.contourf(xs.tolist(), ys.tolist(), values.mT.tolist(), levels, cmap="RdBu_r", extend="both")
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label(f"largest exponent over {branching.horizon} steps (nats per step)")
    bar.set_ticks([t for t in MaxNLocator(7, symmetric=True).tick_values(-bound, bound) if abs(t) < bound])
    for name, run in runs.items():
        axes.plot(*run.mT.tolist(), color=colours.get(name, _OTHER), lw=1.3)
    for begin, point in zip(begins, points, strict=True):
        axes.plot(*torch.stack([begin, point]).mT.tolist(), color="#444444", lw=0.9, ls=":", zorder=3)
    axes.plot(*begins.mT.tolist(), "o", ms=6, mfc="white", mec="black", label="start", zorder=4)
    axes.plot(
        *points.mT.tolist(), "*", ms=11, color="gold", mec="black", mew=0.8, label="branching point", zorder=5
    )
    axes.set_xlim(float(low[0]), float(high[0]))
    axes.set_ylim(float(low[1]), float(high[1]))
    unit = "distance along the "
    axes.set_xlabel("logit of the first player" if whole else f"{unit}most separating direction")
    axes.set_ylabel("logit of the second player" if whole else f"{unit}second direction")
    axes.set_title("Where training separates" + ("" if whole else f" (plane through point {root.name})"))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)


def _plane(
    tree: RideTree, training: UpdateMap, like: Vector, branching: Branching
) -> tuple[Branch, Tensor, Tensor]:
    """A branching point, the origin and two orthonormal directions."""
    root = max((r for r in tree.roots if r.finite), key=lambda r: _parted(tree, r))
    point = root.tensors(like)
    flat = flatten(point)
    if len(flat) == 2:
        return root, torch.zeros_like(flat), torch.eye(2, dtype=flat.dtype)
    directions = torch.tensor(root.directions[:2], dtype=flat.dtype)
    if len(directions) < 2:  # branched along one alone
        stacked = tuple(p.unsqueeze(0) for p in point)
        directions = FiniteTime(training, stacked, branching).directions(stacked)[1][0, :2]
    return root, flat, directions


def _parted(tree: RideTree, root: Branch) -> int:
    """How many runs of the plane came to the second most frequent solution there."""
    found = tree.solutions([b for b in tree.below(root.name) if _in_plane(b, root)])
    return sorted((len(s.branches) for s in found), reverse=True)[1] if len(found) > 1 else 0


def _in_plane(branch: Branch, root: Branch) -> bool:
    """Whether it begins along one of the first two directions."""
    first = re.match(r"[+-](\d+)", branch.name[len(root.name) :])
    return first is not None and int(first[1]) < 2


def _ends(axes: Axes, tree: RideTree, colours: dict[str, str]) -> None:
    """Where the branches of every start ended: a dot per solution, as large as it is frequent."""
    number_of_start = {r.name: int(r.name.split(".")[0]) for r in tree.roots}
    number = len(set(number_of_start.values()))
    named = set()
    solutions = sorted(tree.solutions(), key=lambda s: -len(s.branches))
    for solution in solutions:
        colour = colours[solution.branches[0]]
        from_start = Counter(number_of_start[tree.origin(name)] for name in solution.branches)
        ends = zip(*(tree.branches[name].losses for name in solution.branches), strict=True)
        losses = [statistics.median(values) for values in ends]
        text = f"({', '.join(f'{v:.2f}' for v in losses)}): {len(from_start)} of {number} starts"
        if colour == _OTHER:
            text = f"{len(solutions) - len(_COLOURS)} rarer ones"
        axes.scatter(
            [sum(losses) / len(losses)] * len(from_start),
            list(from_start),
            s=[35 + 3 * count for count in from_start.values()],
            color=colour,
            alpha=0.8,
            edgecolor="white",
            label=None if colour in named else text,
            zorder=3,
        )
        named.add(colour)
    players = max((len(s.losses) for s in solutions), default=1)
    axes.set_title(f"{len(solutions)} solutions in {len(tree.leaves)} branches")
    axes.set_xlabel("loss at the end" if players == 1 else "loss at the end, mean of the players")
    axes.set_ylabel("start")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(0.08)
    axes.grid(color="#d8dce1", lw=0.6)
    axes.set_axisbelow(True)
    legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)
    legend.set_title("solutions by their losses")
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_sizes([40])  # type: ignore[attr-defined]
