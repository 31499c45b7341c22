"""Gain from a momentum of each player's own, on quadratic games whose players differ in curvature.

    python scripts/adapted_momentum.py

For each game: the predicted rate of the first guess 0.8 at π/8, that of the best momentum common to both players (by
differential evolution over |β| and phase), and that of a run with ``GameSpectrumCallback(adapt=True)`` from the first
guess, at its end; all at the same learning rate. Deterministic. Beside it what the run measured over its second half.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from _running import script_parser, silent_trainer
from scipy.optimize import differential_evolution

from lightning_nested.callbacks import GameSpectrumCallback
from lightning_nested.demos import ZooGame
from lightning_nested.demos.game_report import measured_rate
from lightning_nested.games import QuadraticGame
from lightning_nested.games.joint_step import JointStep
from lightning_nested.optim import ComplexSGD

# Curvature of the first player, coupling, curvature of the second; learning rate.
GAMES = [((0.0, 1.0, 0.0), 0.1), ((1.0, 0.1, 0.02), 1.0), ((0.3, 0.4, 0.1), 1.0), ((1.0, 0.5, 0.0), 1.0)]


def game(values: tuple[float, float, float]) -> QuadraticGame:
    """Return the game of ½ax² + bxy and ½cy² − bxy."""
    return QuadraticGame(*(torch.tensor([v], dtype=torch.float64) for v in values))


def predicted(step: JointStep) -> tuple[float, float]:
    """Return the rate of the first guess, and of the best common momentum."""

    def rate(x: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        return step.where(dict.fromkeys(range(2), (float(x[0]), float(x[1])))).rate()

    bounds = [(0.0, 0.95), (0.0, math.pi)]
    return step.rate(), float(differential_evolution(rate, bounds, seed=0, maxiter=40).fun)


def run(values: tuple[float, float, float], lr: float, update: str, updates: int) -> str:
    """Return one row of the table."""
    step = JointStep(
        matrix=lr * game(values).jacobian().numpy(),
        sizes=(1, 1),
        steps=(1, 1) if update == "alternating" else None,
        momentum=np.full(2, 0.8),
        phase=np.full(2, math.pi / 8),
    )
    first, common = predicted(step)
    callback = GameSpectrumCallback(10, k=None, adapt=True)
    module = ZooGame(
        game(values), start=[[1.0], [1.0]], update=update, optimizer=lambda p: ComplexSGD(p, lr=lr)
    )
    silent_trainer(callback, max_epochs=-1, max_steps=updates).fit(module)
    last, measured = callback.history[-1], measured_rate(module.distances)
    momenta = [m for m in last.momenta.values() if m is not None]
    settings = " and ".join(f"{m.momentum:.2f} at {m.phase / math.pi:.2f}π" for m in momenta)
    return f"| {values} | {update} | {first:.4f} | {common:.4f} | {last.rate:.4f} | {measured:.4f} | {settings} |"


def main() -> None:
    """Print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--updates", type=int, default=150)
    options = parser.parse_args()
    print(
        "| curvature, coupling, curvature | order | 0.8 at π/8 | best common | adapted | measured | momenta |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for values, lr in GAMES:
        for update in ("simultaneous", "alternating"):
            print(run(values, lr, update, options.updates), flush=True)


if __name__ == "__main__":
    main()
