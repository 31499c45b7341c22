"""Advice on momentum: the learning rate, momentum and phase that suit a game with these eigenvalues.

They minimise the worst rate over the spectrum of the Jacobian. This objective, a maximum of root moduli, is neither
convex nor smooth, so differential evolution finds the valley, and :func:`search` its bottom.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
from scipy.optimize import differential_evolution, minimize_scalar

from lightning_nested.arguments import checked, fraction
from lightning_nested.games.rates import Array, Eigenvalues, as_eigenvalues, momentum_radii
from lightning_nested.games.search import search
from lightning_nested.optim.options import ROUNDED_PI

_LARGEST_MOMENTUM = 0.9999
# Ranges of log α (for a largest eigenvalue of modulus 1), −log(1 − |β|) and φ.
_BOUNDS = np.array(
    [[math.log(1e-4), math.log(10.0)], [0.0, -math.log(1 - _LARGEST_MOMENTUM)], [0.0, math.pi]]
)
# Eigenvalues that the search looks at to begin with, for players in turns or together; it adds those that turn out
# worse. A cubic costs a thirtieth of a companion matrix.
_ACTIVE = {False: 64, True: 12}
_FINE = (0.05, 0.005, 0.0005)  # sizes of simplices in log units
_RING = 24  # perturbations of an eigenvalue


@dataclass(frozen=True, kw_only=True)
class MomentumSuggestion:
    """Result of :func:`suggest_momentum`.

    Attributes:
        lr: α.
        momentum: |β|.
        phase: φ in [0, π].
        rate: Worst predicted rate over the eigenvalues (with ``noise``, over the perturbed ones), per step.
        alternating: True for players that step one after the other.
        dropped: Number of eigenvalues that were left out.
    """

    lr: float
    momentum: float
    phase: float
    rate: float
    alternating: bool = False
    dropped: int = 0

    @property
    def settings(self) -> dict[str, float]:
        """Arguments for an optimizer: ``ComplexSGD(params, **suggestion.settings)``."""
        return {"lr": self.lr, "momentum": self.momentum, "phase": self.phase}


@checked
def suggest_momentum(
    eigenvalues: Eigenvalues,
    *,
    phase: float | None = None,
    alternating: bool | None = False,
    noise: float = 0.0,
    cutoff: float = 1e-8,
    unstable: Literal["raise", "drop"] = "raise",
) -> MomentumSuggestion:
    """Minimise the worst rate, max over λ of :func:`convergence_rate`, over learning rate α, |β| and phase φ.

    Args:
        eigenvalues: λ of the game's Jacobian, any shape; one of each conjugate pair is enough. The leading ones of
            :func:`game_spectrum` bound α; slow directions count only if they are among them.
        phase: φ to keep; None: any.
        alternating: True for players that step one after the other, see :func:`convergence_rate` for what that
            assumes. None: the faster order; the result says which.
        noise: Relative error that the eigenvalues may have: the rate is the worst over |λ' − λ| <= noise·|λ|. An
            eigenvalue of a solution that attracts is not perturbed to a negative real part. The rate is subharmonic
            in λ, so that its maximum over a region lies on the boundary, where it is sampled.
        cutoff: Eigenvalues below this fraction of the largest are left out: what does not move has no rate.
        unstable: Refuse eigenvalues on the negative real axis with ``"raise"``, or leave them out with ``"drop"`` and
            a warning. No momentum contracts them: at z = 1 the characteristic polynomial is λα(1 − Re β) < 0, so a
            root lies beyond.

    Raises:
        ValueError: An argument out of range, an eigenvalue that no momentum contracts, or no settings that converge.

    Warns:
        UserWarning: Eigenvalues of negative real part, by more than the noise: small steps run away from such a
            point, and the suggested ones approach it.

    Example:
        On the bilinear game no real momentum converges; π/8 reaches a rate of 0.9354, and the best phase 0.8882.

        >>> round(suggest_momentum([1j], phase=math.pi / 8).rate, 4), round(suggest_momentum([1j]).rate, 4)
        (0.9354, 0.8882)
    """
    phase = _checked_phase(phase, noise, cutoff)
    kept, scale = _upper_half(as_eigenvalues(eigenvalues).reshape(-1), cutoff)
    kept, dropped = _stable(kept, unstable, noise)
    targets = _perturbed(kept, noise) / scale
    orders = (False, True) if alternating is None else (alternating,)
    found = [(*_Search(targets, order).run(phase), order) for order in orders]
    rate, lr, momentum, angle, order = min(found, key=lambda each: each[0])
    if not rate < 1:
        _refuse(kept, phase, rate)
    phase = angle if phase is None else phase
    return MomentumSuggestion(
        lr=lr / scale, momentum=momentum, phase=phase, rate=rate, alternating=order, dropped=dropped
    )


def _refuse(values: Array, phase: float | None, rate: float) -> NoReturn:
    worst = values[np.argmin(values.real / np.abs(values))]
    raise ValueError(
        "Some lr, momentum and phase must contract every eigenvalue. Got none that do"
        + (f" at phase={phase:g}" if phase is not None else "")
        + f"; the best rate is {rate:.6g}, and the eigenvalue farthest to the left {worst:.4g}. "
        "Leave the phase free, lower `noise`, or add damping to the game (a gradient penalty)."
    )


class _Search:
    """Minimises the worst rate over normalised eigenvalues; points are (log α, −log(1 − |β|), φ)."""

    def __init__(self, targets: Array, alternating: bool) -> None:
        self.targets, self.alternating = targets, alternating
        self.active = _spread(targets, _ACTIVE[alternating])

    def run(self, phase: float | None) -> tuple[float, float, float, float]:
        """Return rate, lr, |β| and φ of the best point."""
        for _ in range(3):
            point = self._anywhere(phase)
            seen, whole = self.seen(point), self.full(point)
            self._add_worse([point])
            if whole - seen <= 0.1 * (1 - seen):  # else perhaps another valley, seen with the worse ones
                break
        free, turns = (2, ()) if phase is not None else (3, (0.0, math.pi))  # a real β is often the best
        if phase is None:
            point = self._along_the_valley(self._descend(point, free))
        for _ in range(6):
            ends = [point, self._descend(point, 2)]
            ends.append(self._descend(ends[1], free, _FINE[1:]))
            ends += [self._descend(np.append(point[:2], end), 2) for end in turns]
            turns = ()
            point = min([*ends, *self._heavy_ball(phase)], key=self.full)
            if not self._add_worse(ends):
                break
        lr, momentum, angle = _natural(point)
        return self.full(point), float(lr), float(momentum), float(angle)

    def full(self, point: Array) -> float:
        """Return the worst rate over all eigenvalues."""
        return float(self._rates(self.targets, point).max())

    def seen(self, point: Array) -> float:
        """Return the worst rate over the active eigenvalues."""
        return float(self._rates(self.targets[self.active], point).max())

    def _rates(self, targets: Array, points: Array) -> Array:
        return momentum_radii(targets, *_natural(points), self.alternating)

    def _anywhere(self, phase: float | None) -> Array:
        """Find a valley by differential evolution over the active eigenvalues, a generation at a time."""
        targets, bounds = self.targets[self.active], _BOUNDS.copy()
        if phase is not None:
            bounds[2] = abs(phase)
        end = differential_evolution(
            lambda x: self._rates(targets, x.T).max(axis=-1),  # of shape (3, points)
            bounds,
            vectorized=True,
            updating="deferred",
            popsize=14,
            maxiter=50,
            tol=1e-5,
            polish=False,
            seed=0,
        )
        found: Array = end.x
        return found

    def _descend(self, point: Array, free: int, sizes: tuple[float, ...] = _FINE) -> Array:
        """Search over the first ``free`` coordinates."""
        kept = point[free:]
        found = search(
            lambda x: self.seen(np.append(x, kept)), point[:free], _BOUNDS[:free], sizes, evaluations=50
        )
        return np.append(found, kept)

    def _along_the_valley(self, point: Array) -> Array:
        """Find the best phase nearby, with the best α and |β| at each: too narrow for three at once."""
        tried = [point]

        def objective(phase: float) -> float:
            nearest = min(tried, key=lambda p: float(abs(p[2] - phase)))
            tried.append(self._descend(np.append(nearest[:2], phase), 2, (0.02,)))
            return self.seen(tried[-1])

        bounds = (max(0.0, point[2] - 0.3), min(math.pi, point[2] + 0.3))
        minimize_scalar(objective, bounds=bounds, method="bounded", options={"xatol": 1e-4, "maxiter": 16})
        tried.sort(key=self.seen)
        self._add_worse(tried[:6])
        return min(tried[:6], key=self.full)

    def _heavy_ball(self, phase: float | None) -> list[Array]:
        """Return Polyak's settings, optimal for an interval of positive eigenvalues; none for other spectra."""
        if self.targets.imag.any() or phase not in (None, 0.0):
            return []
        low, high = np.sqrt(self.targets.real.min()), np.sqrt(self.targets.real.max())
        momentum = min(((high - low) / (high + low)) ** 2, _LARGEST_MOMENTUM)
        return [np.array([2 * math.log(2 / (high + low)), -math.log1p(-momentum), 0.0])]

    def _add_worse(self, points: list[Array]) -> bool:
        """Make eigenvalues active that are worse than all active ones at one of these points."""
        before = len(self.active)
        for point in points:
            radii = self._rates(self.targets, point)
            worse = np.flatnonzero(radii > radii[self.active].max() + 1e-8)
            self.active = np.concatenate([self.active, worse[np.argsort(-radii[worse])][:2]])
        return len(self.active) > before


def _natural(points: Array) -> tuple[Array, Array, Array]:
    """Return α, |β| and φ."""
    return np.exp(points[..., 0]), -np.expm1(-points[..., 1]), points[..., 2]


def _upper_half(values: Array, cutoff: float) -> tuple[Array, float]:
    """Return one of each conjugate pair, without what is too small to count, and the largest modulus."""
    scale = float(np.abs(values).max())
    if scale == 0:
        raise ValueError(
            "An eigenvalue must differ from 0. Got only zeros: nothing moves, and nothing converges."
        )
    kept = values[np.abs(values) > cutoff * scale]
    kept = kept.real + 1j * np.where(np.abs(kept.imag) > 1e-12 * scale, np.abs(kept.imag), 0.0)
    return np.unique(np.round(kept / scale, 12)) * scale, scale


def _stable(values: Array, unstable: Literal["raise", "drop"], noise: float) -> tuple[Array, int]:
    """Return the eigenvalues that some momentum contracts, and the number of the others."""
    hopeless = (values.imag == 0) & (values.real < 0)
    if hopeless.any():
        text = (
            f"{int(hopeless.sum())} of {len(values)} distinct eigenvalues lie on the negative real axis, "
            f"as far as {values[hopeless].real.min():.4g}: the players run away from this point whatever the momentum"
        )
        if unstable == "raise" or hopeless.all():
            raise ValueError(
                f"Eigenvalues must not be negative. Got: {text}. Go on training from another point, or leave "
                "them out with unstable='drop'."
            )
        warnings.warn(f"{text}. They are left out.", stacklevel=3)
    values = values[~hopeless]
    left = values[values.real < -noise * np.abs(values) - 1e-8 * np.abs(values).max()]
    if len(left):
        warnings.warn(
            f"{len(left)} eigenvalues have a negative real part, as low as {left.real.min():.4g}: small steps run away "
            "from this point, and the suggested settings would approach it. Is it a solution?",
            stacklevel=3,
        )
    return values, int(hopeless.sum())


def _perturbed(values: Array, noise: float) -> Array:
    """Return the eigenvalues and, with noise, a circle around each."""
    if noise == 0:
        return values
    circle = noise * np.exp(2j * math.pi * np.arange(_RING) / _RING)
    around = np.concatenate([values, np.outer(values, 1 + circle).reshape(-1)])
    right = np.where(values.real >= -noise * np.abs(values), 0.0, -np.inf)
    real = np.maximum(around.real, np.concatenate([right, np.repeat(right, _RING)]))
    return np.unique(np.round(real + 1j * np.abs(around.imag), 15))


def _spread(values: Array, count: int) -> Array:
    """Return indices of up to ``count`` eigenvalues, each the farthest from those before it in modulus and angle."""
    place = np.log(values)
    chosen = [int(np.argmax(np.abs(values)))]
    distance = np.abs(place - place[chosen[0]])
    while len(chosen) < min(count, len(values)):
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.abs(place - place[chosen[-1]]))
    return np.array(chosen)


def _checked_phase(phase: float | None, noise: float, cutoff: float) -> float | None:
    """Refuse arguments out of range, and return the phase in [−π, π]."""
    if phase is not None and not abs(phase) <= ROUNDED_PI:
        raise ValueError(f"phase must lie in [-π, π], or be None. Got {phase}.")
    fraction(noise=noise, cutoff=cutoff)
    return None if phase is None else min(max(float(phase), -math.pi), math.pi)
