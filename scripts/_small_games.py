"""Small games with many settings side by side: how many gradients each method needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from _running import silent_trainer
from _two_player_runs import Array, Field, Settings, evaluations, quadratic
from lightning.pytorch import Callback, LightningModule, Trainer
from scipy.special import expit

from lightning_nested.callbacks import GameSpectrumCallback
from lightning_nested.demos import ZooGame
from lightning_nested.games import DiracGAN, QuadraticGame, suggest_momentum
from lightning_nested.games.zoo.game import Game
from lightning_nested.optim import ComplexSGD

TOLERANCE, LIMIT = 1e-4, 3000
MAGNITUDES = (0.3, 0.5, 0.8, 0.9)
PHASES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of π
RATES = np.geomspace(0.02, 4.0, 24)  # over the largest |eigenvalue|


@dataclass(frozen=True, kw_only=True)
class SmallGame:
    """A game of one seed, its gradients in NumPy, and where it starts.

    Attributes:
        eigenvalues: Of its Jacobian at the solution 0; the largest has modulus ``scale``.
    """

    game: Game
    field: Field
    start: tuple[Array, Array]
    eigenvalues: torch.Tensor

    @property
    def scale(self) -> float:
        """Return the largest |eigenvalue|: rates are in units of its inverse."""
        return float(self.eigenvalues.abs().max())


def quadratic_game(game: QuadraticGame, generator: torch.Generator) -> SmallGame:
    """Return a quadratic game with diagonal matrices, from a normal start."""
    start = tuple(v.detach().numpy() for v in game.initial(generator))
    field = quadratic(game.first.diagonal().numpy(), game.coupling.diagonal().numpy())
    return SmallGame(game=game, field=field, start=(start[0], start[1]), eigenvalues=game.eigenvalues())


def bilinear(seed: int) -> SmallGame:
    """Ten pure conflicts xᵢbᵢyᵢ with b from U(¼, 1)."""
    generator = torch.Generator().manual_seed(seed)
    b = 0.25 + 0.75 * torch.rand(10, generator=generator, dtype=torch.float64)
    return quadratic_game(QuadraticGame(torch.zeros_like(b), b, torch.zeros_like(b)), generator)


def dirac(seed: int) -> SmallGame:
    """The Dirac-GAN without penalty, as it is, from a normal start."""
    generator = torch.Generator().manual_seed(seed)

    def real(psi: Array, theta: Array) -> Array:
        return np.asarray(expit(psi * theta))

    field = (lambda x, y: y * real(x, y), lambda x, y: -x * real(x, y))
    start = torch.randn(2, 1, generator=generator, dtype=torch.float64).numpy()
    game = DiracGAN()
    return SmallGame(game=game, field=field, start=(start[0], start[1]), eigenvalues=game.eigenvalues())


def mixture(share: float) -> Callable[[int], SmallGame]:
    """Return the function that draws a mix with up to this share of conflict in each of ten coordinates."""

    def make(seed: int) -> SmallGame:
        generator = torch.Generator().manual_seed(seed)
        return quadratic_game(QuadraticGame.mixture(10, share, generator), generator)

    return make


GAMES: dict[str, Callable[[int], SmallGame]] = {
    "bilinear": bilinear,
    "Dirac-GAN": dirac,
    "agreement (γ ≤ 0.3)": mixture(0.3),
    "mixed (γ ≤ 1)": mixture(1.0),
}


def settings(magnitudes: Sequence[float], phases: Sequence[float]) -> Settings:
    """Return all combinations with the rates, alternating."""
    lr, size, phase = (v.reshape(-1) for v in np.meshgrid(RATES, magnitudes, phases, indexing="ij"))
    beta = size * np.exp(1j * np.pi * phase)
    return Settings(lr=lr, beta=beta, alternating=np.ones(len(lr), dtype=bool))


def methods() -> dict[str, Settings]:
    """Return every method with its grid; the complex one holds the others that have momentum."""
    none = settings([0.0], [0.0])
    alone = {"beta": none.beta, "alternating": ~none.alternating}
    return {
        "no momentum": none,
        "positive momentum": settings(MAGNITUDES, [0.0]),
        "negative momentum": settings(MAGNITUDES, [1.0]),
        "complex, 0.8 at π/8": settings([0.8], [1 / 8]),
        "complex, best of the grid": settings((0.0, *MAGNITUDES), PHASES),
        "optimistic": Settings(lr=none.lr, method="optimistic", **alone),
        "extragradient": Settings(lr=none.lr, method="extragradient", **alone),
    }


def counts(make: Callable[[int], SmallGame], grid: Settings, seeds: Sequence[int]) -> Array:
    """Return the gradients that each setting needs, (settings, seeds)."""
    found = []
    for seed in seeds:
        case = make(seed)
        own = Settings(
            lr=grid.lr / case.scale, beta=grid.beta, alternating=grid.alternating, method=grid.method
        )
        found.append(evaluations(case.field, case.start, own, TOLERANCE, LIMIT))
    return np.stack(found, axis=1)


def best(found: Array) -> int:
    """Return the setting that fails least, then has the smallest mean logarithm."""
    failed = np.isinf(found).sum(axis=1)
    logarithm = np.log(np.minimum(found, 2 * LIMIT)).mean(axis=1)
    return int(np.lexsort((logarithm, failed))[0])


def suggested(case: SmallGame) -> float:
    """Return the gradients that the setting read from the exact spectrum needs."""
    advice = suggest_momentum(case.eigenvalues, alternating=True)
    one = Settings(
        lr=np.array([advice.lr]),
        beta=np.array([advice.momentum * np.exp(1j * advice.phase)]),
        alternating=np.array([advice.alternating]),
    )
    return float(evaluations(case.field, case.start, one, TOLERANCE, LIMIT)[0])


class Arrive(Callback):
    """Stop when the distance to the solution is small enough."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Look at the distance."""
        assert isinstance(pl_module, ZooGame)
        # What is recorded after whole updates; the distance itself changes with each player's step.
        distances = pl_module.distances
        if distances[-1] <= TOLERANCE * distances[0]:
            trainer.should_stop = True


def adapted(case: SmallGame, rate: float, limit: int = 400) -> float:
    """Return the updates that ``adapt=True`` needs from 0.8 at π/8; the gradients its spectra cost are not in it."""
    module = ZooGame(
        case.game,
        start=[v.tolist() for v in case.start],
        update="alternating",
        optimizer=lambda p: ComplexSGD(p, lr=rate / case.scale),
    )
    trainer = silent_trainer(
        GameSpectrumCallback(10, k=None, adapt=True), Arrive(), max_epochs=-1, max_steps=limit
    )
    trainer.fit(module)
    distances = np.asarray(module.distances)
    small = np.flatnonzero(distances <= TOLERANCE * distances[0])
    return float(small[0]) if len(small) else math.inf


def adapt_row(
    make: Callable[[int], SmallGame], tuning: Sequence[int], seeds: Sequence[int], rates: Sequence[float]
) -> dict[str, object]:
    """Return the rate that the tuning seeds choose for ``adapt=True``, and the updates of each reported seed."""
    tried = np.array([[adapted(make(seed), rate) for seed in tuning] for rate in rates])
    rate = rates[best(tried)]
    return {"rate": rate, "found": [adapted(make(seed), rate) for seed in seeds]}


def play(
    make: Callable[[int], SmallGame], tuning: Sequence[int], seeds: Sequence[int]
) -> dict[str, dict[str, object]]:
    """Return for every method the chosen setting and the gradients of each reported seed; and the map of momenta."""
    rows: dict[str, dict[str, object]] = {}
    for name, grid in methods().items():
        chosen = best(counts(make, grid, tuning))
        found = counts(make, grid.take(np.array([chosen])), seeds)[0]
        beta = grid.beta[chosen]
        rows[name] = {
            "rate": float(grid.lr[chosen]),
            "momentum": float(abs(beta)),
            "phase": float(abs(np.angle(beta)) / np.pi),
            "found": found.tolist(),
        }
    rows["read from the spectrum"] = {"found": [suggested(make(seed)) for seed in seeds]}
    grid = settings(MAGNITUDES, PHASES)
    tuned, shown = counts(make, grid, tuning), counts(make, grid, seeds)
    # Rows of one momentum, at all rates.
    places = np.arange(len(grid.lr)).reshape(len(RATES), -1)
    medians = [np.median(shown[momentum[best(tuned[momentum])]]) for momentum in places.T]
    rows["map"] = {"found": np.reshape(medians, (len(MAGNITUDES), len(PHASES))).tolist()}
    return rows
