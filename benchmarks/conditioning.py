"""How well conditioned the Hessian is along a training, for an MLP, a CNN, an LSTM and a transformer.

Networks of some hundred weights learn 200 digits in minibatches. At some steps the Hessian of the whole training loss
is written out in float64, so that its eigenvalues are exact: the largest and the smallest one, the share that is
negative, how many directions carry the curvature, and the products that conjugate gradient needs to solve a damped
system to 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _measuring import Spread, load, parser, print_table, report, start
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from lightning_nested.figures.style import COLOURS, open_axes, styled_figure
from lightning_nested.files import replace_figure
from lightning_nested.linalg.operators import as_operator
from lightning_nested.linalg.solvers import ConjugateGradient

# Relative to the largest eigenvalue: below it a direction counts as flat, and the damping of the systems.
FLAT, DAMPING = 1e-4, 1e-3


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 7, batch_first=True), nn.Linear(7, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of images (batch, 1, 8, 8)."""
        logits: Tensor = self.out(self.lstm(x.squeeze(1))[0][:, -1])
        return logits


class Attention(nn.Module):
    """One transformer layer over the rows of an image, and the mean over them."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(0.1 * torch.randn(8, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of images (batch, 1, 8, 8)."""
        logits: Tensor = self.out(self.layer(x.squeeze(1) + self.places).mean(1))
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)),
    "CNN": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(24, 10),
    ),
    "LSTM": Recurrent,
    "transformer": Attention,
}


def hessian(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Return the matrix of second derivatives, written out a row at a time."""
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), parameters, create_graph=True)])
    rows = [
        torch.cat([d.reshape(-1) for d in torch.autograd.grad(entry, parameters, retain_graph=True)])
        for entry in gradient
    ]
    found = torch.stack(rows)
    return (found + found.T) / 2


def products_to(error: float, matrix: Tensor, right: Tensor) -> float:
    """Return the fewest products after which conjugate gradient is right to ``error``; infinite if it never is."""
    truth = torch.linalg.solve(matrix, right)
    operator = as_operator(matrix, (right,))
    for budget in (1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 57, 80, 113, 160, 226, 320, 640):
        found = ConjugateGradient(max_iterations=budget, tolerance=0.0).solve(operator, (right,)).x[0]
        if float((found - truth).norm() / truth.norm()) <= error:
            return float(budget)
    return math.inf


def spectrum_numbers(matrix: Tensor) -> dict[str, Any]:
    """Return what the table shows of a Hessian, and its eigenvalues."""
    values = torch.linalg.eigvalsh(matrix)
    top = float(values[-1])
    # The modulus, so that the damped system is definite, as solvers that stop at negative curvature need it.
    _, vectors = torch.linalg.eigh(matrix)
    definite = vectors @ torch.diag(values.abs() + DAMPING * top) @ vectors.T
    right = torch.randn(len(values), dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    return {
        "largest": top,
        "smallest": float(values[0]) / top,
        "negative": float((values < -FLAT * top).double().mean()),
        "directions": float(values.abs().sum() ** 2 / values.square().sum()),
        "products": products_to(0.01, definite, right),
        "eigenvalues": values.tolist(),
    }


def train(make: Callable[[], nn.Module], seed: int, marks: Sequence[int]) -> list[dict[str, Any]]:
    """Return the numbers of the Hessian after so many steps."""
    torch.manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target))[:200]
    images = (torch.tensor(digits.images)[order] / 16).unsqueeze(1)
    labels = torch.tensor(digits.target)[order]
    network = make().double()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)

    def whole() -> Tensor:
        # The fused kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return cross_entropy(network(images), labels)

    found = []
    for step in range(max(marks) + 1):
        if step in marks:
            found.append(
                {
                    "step": step,
                    "loss": float(whole().detach()),
                    **spectrum_numbers(hessian(whole, parameters)),
                }
            )
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()
    return found


def draw(path: Path, results: dict[str, list[list[dict[str, Any]]]], marks: Sequence[int]) -> None:
    """Draw the sorted moduli of the eigenvalues of the first seed, relative to the largest."""
    with styled_figure(11.0, 3.4, dpi=110, layout="constrained") as figure:
        panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
        for panel, (name, seeds) in zip(panels, results.items(), strict=True):
            for entry, colour in zip(seeds[0], COLOURS, strict=False):
                values = torch.tensor(entry["eigenvalues"])
                size = (values.abs() / values.max()).sort(descending=True).values.clamp_min(1e-9)
                panel.semilogy(size, color=colour, lw=1.4, label=f"after {entry['step']} steps")
            open_axes(panel, name, "rank", "|eigenvalue| / largest" if panel is panels[0] else "")
        panels[-1].legend()
        replace_figure(path, figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, draw the figure."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--marks", type=int, nargs="+", default=[0, 20, 200, 2000])
    options.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options.add_argument("--figure", type=Path, default=None)
    arguments = options.parse_args(argv)
    start(arguments)
    before = load()
    results = {
        name: [train(NETWORKS[name], 10 + seed, arguments.marks) for seed in range(arguments.rounds)]
        for name in arguments.only
    }
    rows = []
    for name, seeds in results.items():
        for i, step in enumerate(arguments.marks):
            entries = [seed[i] for seed in seeds]

            def text(key: str, digits: int, factor: float = 1.0, entries: Any = entries) -> str:
                return Spread.of([factor * entry[key] for entry in entries]).text(digits)

            rows.append(
                [
                    f"{name}, {len(entries[0]['eigenvalues'])} weights",
                    str(step),
                    text("loss", 3),
                    text("largest", 2),
                    text("smallest", 3),
                    text("negative", 1, 100.0),
                    text("directions", 1),
                    text("products", 0),
                ]
            )
    print_table(
        [
            "network",
            "steps",
            "training loss",
            "largest eigenvalue",
            "smallest / largest",
            "negative, %",
            "directions",
            "products of CG to 1 %",
        ],
        rows,
    )
    print(f"load {before} to {load()}")
    if arguments.figure is not None:
        draw(arguments.figure, results, arguments.marks)
    report(arguments, results, load_before=before)
    return results


if __name__ == "__main__":
    main()
