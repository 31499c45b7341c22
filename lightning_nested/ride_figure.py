"""The figure of a ride: the exponent field with the runs on it, and where the branches ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.dynamics import Branching, RideTree, update_map
from lightning_nested.dynamics.branching import FiniteTime
from lightning_nested.games import Game
from lightning_nested.hypergradient.vectors import Vector, flatten, unflatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#666666")
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}
_NAMED = 6  # solutions in the legend
_LARGEST = 64  # parameters up to which the field is drawn


def ride_figure(
    tree: RideTree,
    game: Game,
    starts: Sequence[Vector],
    optimizer: Callable[[list[Tensor]], Optimizer],
    branching: Branching,
    *,
    resolution: int = 33,
) -> Figure:
    """Draw the field of the top finite-time exponent with the runs of the tree, and the losses where they ended.

    With two parameters the axes are the parameters. With more, the field lies on the plane through the first
    branching point along its two most separating directions, and runs are projected onto that plane.

    Args:
        tree: A ride.
        game: Its game.
        starts: Its starts.
        optimizer: Its optimizer.
        branching: Horizon of the exponents.
        resolution: Points a side.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    like = tuple(starts[0])
    size = sum(p.numel() for p in like)
    number = {name: i for i, s in enumerate(tree.solutions()) for name in s.branches}
    with mpl.rc_context(_STYLE):
        field = size <= _LARGEST and bool(tree.roots)
        figure = Figure(figsize=(12.5 if field else 6.5, 5.4), dpi=110, facecolor="white")
        axes = figure.subplots(1, 2 if field else 1, squeeze=False)[0]
        if field:
            _field(axes[0], tree, game, like, optimizer, branching, resolution, number)
        _ends(axes[-1], tree, number)
        figure.tight_layout(w_pad=3)
    return figure


def _field(
    axes: Axes,
    tree: RideTree,
    game: Game,
    like: Vector,
    optimizer: Callable[[list[Tensor]], Optimizer],
    branching: Branching,
    resolution: int,
    number: dict[str, int],
) -> None:
    training = update_map(optimizer([p.clone() for p in like]), game.losses)
    origin, basis = _plane(tree, training, like, branching)
    flat_plane = len(origin) == 2
    # Where the plane is all there is every run lies on it; else show those of its own branching point.
    roots = tree.roots if flat_plane else tree.roots[:1]
    drawn = {}
    for root in roots:
        start = flatten(root.tensors(like))
        for b in tree.below(root.name):
            if b.path and b.finite:
                path = torch.cat([start[None], torch.tensor(b.path, dtype=origin.dtype)])
                drawn[b.name] = (path - origin) @ basis.mT
    points = torch.stack([flatten(r.tensors(like)) - origin for r in roots]) @ basis.mT
    reach = torch.cat(
        [points, *(path[: max(3, len(path) // (3 if flat_plane else 20))] for path in drawn.values())]
    )
    low, high = reach.quantile(0.02, dim=0) - 1.0, reach.quantile(0.98, dim=0) + 1.0
    xs, ys = (
        torch.linspace(float(a), float(b), resolution, dtype=origin.dtype)
        for a, b in zip(low, high, strict=True)
    )
    flat = origin + torch.cartesian_prod(xs, ys) @ basis
    grid = tuple(torch.stack(p) for p in zip(*(unflatten(f, like) for f in flat), strict=True))
    with torch.no_grad():
        values = FiniteTime(training, grid, branching).exponents(grid)[:, 0].reshape(resolution, resolution)
    bound = float(values.abs().quantile(0.99)) or 1.0
    mesh = axes.pcolormesh(
        xs.tolist(),
        ys.tolist(),
        values.mT.tolist(),
        cmap="RdBu_r",
        vmin=-bound,
        vmax=bound,
        shading="gouraud",
    )
    axes.figure.colorbar(
        mesh, ax=axes, label=f"top exponent over {branching.horizon} steps (nats per step)", pad=0.02
    )
    for name, path in drawn.items():
        colour = _COLOURS[number.get(name, 7) % len(_COLOURS)]
        axes.plot(path[:, 0].tolist(), path[:, 1].tolist(), color=colour, lw=1.1, alpha=0.8)
    axes.plot(
        points[:, 0].tolist(),
        points[:, 1].tolist(),
        "k*",
        ms=9,
        mec="white",
        mew=0.6,
        label="branching point",
    )
    axes.set_xlim(float(low[0]), float(high[0]))
    axes.set_ylim(float(low[1]), float(high[1]))
    two = flat_plane
    axes.set_xlabel("logit of the first player" if two else "most separating direction")
    axes.set_ylabel("logit of the second player" if two else "second direction")
    axes.set_title("Where training separates" + ("" if two else " (plane through branching point 0)"))
    axes.legend(loc="upper left")


def _plane(tree: RideTree, training: Any, like: Vector, branching: Branching) -> tuple[Tensor, Tensor]:
    """Origin and two orthonormal directions."""
    root = tree.roots[0].tensors(like)
    flat = flatten(root)
    if len(flat) == 2:
        return torch.zeros_like(flat), torch.eye(2, dtype=flat.dtype)
    stacked = tuple(p.unsqueeze(0) for p in root)
    _, directions = FiniteTime(training, stacked, branching).directions(stacked)
    return flat, directions[0, :2]


def _ends(axes: Axes, tree: RideTree, number: dict[str, int]) -> None:
    solutions = tree.solutions()
    largest = sorted(range(len(solutions)), key=lambda i: -len(solutions[i].branches))[:_NAMED]
    for i, solution in enumerate(solutions):
        ends = [tree.branches[name] for name in solution.branches]
        roots = {name.split("+")[0].split("-")[0] for name in solution.branches}
        text = ", ".join(f"{v:.2f}" for v in solution.losses)
        axes.scatter(
            [ends[0].losses[0]],
            [ends[0].losses[1] if len(ends[0].losses) > 1 else float(i)],
            s=25 + 4 * len(ends),
            color=_COLOURS[i % len(_COLOURS)],
            alpha=0.75,
            edgecolor="white",
            label=f"({text}): {len(ends)} branches of {len(roots)} points" if i in largest else None,
        )
    axes.set_title(f"{len(solutions)} solutions in {len(tree.leaves)} branches")
    axes.set_xlabel("loss of the first player" if len(tree.leaves[0].losses) > 1 else "loss")
    axes.set_ylabel("loss of the second player" if len(tree.leaves[0].losses) > 1 else "solution")
    axes.margins(0.15)
    axes.grid(color="#d8dce1", lw=0.6)
    axes.set_axisbelow(True)
    legend = axes.legend(loc="best", title="losses: the most frequent")
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_sizes([40])  # type: ignore[attr-defined]
