"""Figure of a ride: the exponent field with the runs on it, and the ends of all branches."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.dynamics import Branch, Branching, RideTree, UpdateMap, update_map
from lightning_nested.dynamics.riders.branching import FiniteTime
from lightning_nested.figures.style import DARK_COLOURS, GREY, open_axes, styled_figure
from lightning_nested.games import Game
from lightning_nested.linalg.vectors import Vector, flatten, unflatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Largest number of parameters for which the field is drawn.
_LARGEST = 64
# Colours of the field, an odd number: white is around zero.
_LEVELS = 21


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
    """
    like = tuple(starts[0])
    colours = _colours(tree)
    field = 2 <= sum(p.numel() for p in like) <= _LARGEST and any(r.finite for r in tree.roots)
    ratios = [1.15, 1.0] if field else [1.0]
    with styled_figure(13.5 if field else 7.0, 5.6) as figure:
        axes = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
        if field:
            training = update_map(optimizer([p.clone() for p in like]), game.losses)
            _field(axes[0], tree, training, like, branching, resolution, colours)
        _ends(axes[-1], tree, colours)
        figure.tight_layout(w_pad=2.5)
    return figure


def _colours(tree: RideTree) -> dict[str, str]:
    """Return each branch's colour, that of its solution; the most frequent solution has the first."""
    solutions = sorted(tree.solutions(), key=lambda s: -len(s.branches))
    return {
        name: DARK_COLOURS[i] if i < len(DARK_COLOURS) else GREY
        for i, s in enumerate(solutions)
        for name in s.branches
    }


def _field(
    axes: Axes,
    tree: RideTree,
    training: UpdateMap,
    like: Vector,
    branching: Branching,
    resolution: int,
    colours: dict[str, str],
) -> None:
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
    # Show the surroundings of the places where runs begin: the runs leave towards infinite logits.
    seen = torch.cat([points, begins, *(run[:2] for run in runs.values())])
    low, high = seen.amin(0), seen.amax(0)
    margin = 0.25 * (high - low).clamp_min(4.0)
    low, high = low - margin, high + margin
    _exponents(axes, training, like, branching, (origin, basis), (low, high), resolution)
    for name, run in runs.items():
        axes.plot(*run.mT.tolist(), color=colours.get(name, GREY), lw=1.3)
    for begin, point in zip(begins, points, strict=True):
        axes.plot(*torch.stack([begin, point]).mT.tolist(), color="#444444", lw=0.9, ls=":", zorder=3)
    axes.plot(*begins.mT.tolist(), "o", ms=6, mfc="white", mec="black", label="start", zorder=4)
    star: dict[str, Any] = {"ms": 11, "color": "gold", "mec": "black", "mew": 0.8}
    axes.plot(*points.mT.tolist(), "*", **star, label="branching point", zorder=5)
    xlim, ylim = torch.stack([low, high]).mT.tolist()
    axes.set(xlim=xlim, ylim=ylim)
    title = "Where training separates"
    if whole:
        open_axes(axes, title, "logit of the first player", "logit of the second player")
    else:
        title += f" (plane through point {root.name})"
        unit = "distance along the"
        open_axes(axes, title, f"{unit} most separating direction", f"{unit} second direction")
    axes.grid(visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _exponents(
    axes: Axes,
    training: UpdateMap,
    like: Vector,
    branching: Branching,
    plane: tuple[Tensor, Tensor],
    corners: tuple[Tensor, Tensor],
    resolution: int,
) -> None:
    """Draw the largest finite-time exponent on a grid between two corners of the plane (origin, basis)."""
    origin, basis = plane
    xs, ys = (
        torch.linspace(float(a), float(b), resolution, dtype=origin.dtype)
        for a, b in zip(*corners, strict=True)
    )
    flat = origin + torch.cartesian_prod(xs, ys) @ basis
    grid = tuple(torch.stack(p) for p in zip(*(unflatten(f, like) for f in flat), strict=True))
    with torch.no_grad():
        values = FiniteTime(training, grid, branching).exponents(grid)[:, 0].reshape(resolution, resolution)
    shown = values[torch.isfinite(values)].abs()
    bound = float(shown.quantile(0.995)) if len(shown) else 1.0
    levels = torch.linspace(-bound or -1.0, bound or 1.0, _LEVELS + 1).tolist()
    from matplotlib.ticker import MaxNLocator

    mesh = axes.contourf(xs.tolist(), ys.tolist(), values.mT.tolist(), levels, cmap="RdBu_r", extend="both")
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label(f"largest exponent over {branching.horizon} steps (nats per step)")
    bar.set_ticks([t for t in MaxNLocator(7, symmetric=True).tick_values(-bound, bound) if abs(t) < bound])


def _plane(
    tree: RideTree, training: UpdateMap, like: Vector, branching: Branching
) -> tuple[Branch, Tensor, Tensor]:
    """Return a branching point, the origin and two orthonormal directions."""
    root = max((r for r in tree.roots if r.finite), key=lambda r: _parted(tree, r))
    point = root.tensors(like)
    flat = flatten(point)
    if len(flat) == 2:
        return root, torch.zeros_like(flat), torch.eye(2, dtype=flat.dtype)
    directions = torch.tensor(root.directions[:2], dtype=flat.dtype)
    # The ride branched along one direction alone.
    if len(directions) < 2:
        stacked = tuple(p.unsqueeze(0) for p in point)
        directions = FiniteTime(training, stacked, branching).directions(stacked)[1][0, :2]
    return root, flat, directions


def _parted(tree: RideTree, root: Branch) -> int:
    """Count the runs of the plane that ended in its second most frequent solution."""
    found = tree.solutions([b for b in tree.below(root.name) if _in_plane(b, root)])
    return sorted((len(s.branches) for s in found), reverse=True)[1] if len(found) > 1 else 0


def _in_plane(branch: Branch, root: Branch) -> bool:
    """Return True if the branch begins along one of the first two directions."""
    first = re.match(r"[+-](\d+)", branch.name[len(root.name) :])
    return first is not None and int(first[1]) < 2


def _ends(axes: Axes, tree: RideTree, colours: dict[str, str]) -> None:
    """Draw the ends of every start's branches: a dot per solution, as large as it is frequent."""
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
        if colour == GREY:
            text = f"{len(solutions) - len(DARK_COLOURS)} rarer ones"
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
    from matplotlib.ticker import MaxNLocator

    players = max((len(s.losses) for s in solutions), default=1)
    x = "loss at the end" if players == 1 else "loss at the end, mean of the players"
    open_axes(axes, f"{len(solutions)} solutions in {len(tree.leaves)} branches", x, "start")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(0.08)
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
    legend = axes.legend(**place, ncols=3, title="solutions by their losses")
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_sizes([40])  # type: ignore[attr-defined]
