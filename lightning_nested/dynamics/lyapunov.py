"""Lyapunov exponents of a differentiable map: the mean logarithmic growth of small differences.

Benettin, Galgani, Giorgilli & Strelcyn (1980), Meccanica 15:9-30: push an orthonormal frame through the Jacobian,
orthonormalise it again, and average the logarithms of the diagonal of the triangular factor.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_nested.dynamics.frames import (
    covariant_directions,
    from_rows,
    orthonormalize,
    random_frame,
    to_rows,
    window_weights,
)
from lightning_nested.dynamics.maps import DifferentiableMap, State, Step, as_map, recorded
from lightning_nested.linalg.vectors import Vector

_RECORD = 30  # steps from which on recording the map's operations pays
_SELF_CHECK = 32  # coordinates up to which the determinant is computed beside the full spectrum


@dataclass(frozen=True, kw_only=True, eq=False)
class LyapunovSpectrum:
    """What :func:`lyapunov_spectrum` measured. Shapes lead with (batch,) where start points came in a batch.

    Attributes:
        exponents: (..., k), largest first, nats per unit time.
        growth: (T, ..., k), logarithmic growth in each of T windows between orthonormalisations: the local exponents
            times ``window_time``.
        window_time: Time between two orthonormalisations.
        state: The state after the last step, in the form of x0.
        frame: (..., k, n), the final orthonormal frame, one tangent per row.
        covariant: (T, ..., k, n), unit covariant directions after each window, or None if not asked for.
        log_determinant: (...,), mean log |det J| per unit time, for a full spectrum of at most 32 coordinates; else
            None. It equals the sum of the exponents.
        weights: (T,), the weight of each window in the average.
    """

    exponents: Tensor
    growth: Tensor
    window_time: float
    state: State
    frame: Tensor
    covariant: Tensor | None
    log_determinant: Tensor | None
    weights: Tensor = field(repr=False)

    @property
    def local(self) -> Tensor:
        """(T, ..., k), the exponents of each window alone."""
        return self.growth / self.window_time

    @property
    def running(self) -> Tensor:
        """(T, ..., k), the plain average up to and including each window."""
        count = torch.arange(1, len(self.growth) + 1, dtype=self.growth.dtype, device=self.growth.device)
        return self.local.cumsum(0) / count.view(-1, *[1] * (self.growth.ndim - 1))

    @property
    def standard_error(self) -> Tensor:
        """(..., k), of the plain average over time, from the spread of up to 20 successive blocks of it.

        It needs blocks that are long against the correlation time; NaN for fewer than four windows. Along an orbit
        that repeats it does not see that the error falls as 1/T, and is then too large.
        """
        blocks = min(20, len(self.growth) // 2)
        if blocks < 2:
            return torch.full_like(self.exponents, math.nan)
        size = len(self.growth) // blocks
        means = self.local[: blocks * size].reshape(blocks, size, *self.exponents.shape).mean(1)
        error: Tensor = means.std(0) / blocks**0.5
        return error

    @property
    def kaplan_yorke(self) -> Tensor:
        """(...,), the Kaplan–Yorke dimension of these exponents: see :func:`kaplan_yorke_dimension`."""
        return kaplan_yorke_dimension(self.exponents)


def kaplan_yorke_dimension(exponents: Tensor) -> Tensor:
    """D = j + Σ_{i≤j} λ_i / |λ_{j+1}|, with j the largest number of leading exponents whose sum is not negative.

    With fewer exponents than dimensions whose sum is still not negative, the answer is their number: a lower bound.
    Kaplan & Yorke (1979), Lecture Notes in Mathematics 730:204-227.

    Args:
        exponents: (..., k), largest first.

    >>> float(kaplan_yorke_dimension(torch.tensor([0.5, 0.0, -1.0])))
    2.5
    """
    total = exponents.cumsum(-1)
    j = (total >= 0).long().cumprod(-1).sum(-1)
    before = torch.cat([torch.zeros_like(total[..., :1]), total], -1).gather(-1, j.unsqueeze(-1)).squeeze(-1)
    following = torch.cat([exponents, torch.full_like(exponents[..., :1], -math.inf)], -1)
    return j + before / following.gather(-1, j.unsqueeze(-1)).squeeze(-1).abs()


def lyapunov_exponents(
    step: Step | DifferentiableMap,
    x0: State,
    *,
    k: int,
    num_steps: int,
    burn_in: int = 0,
    dt: float = 1.0,
    orthonormalize_every: int = 1,
    batched: bool = False,
    window: str = "uniform",
    frame: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The k largest Lyapunov exponents λ_i = lim (1/T) Σ_t log R_ii(t) of a map, in nats per unit time.

    k Jacobian-vector products a step; memory of k tangents. The average converges as 1/T, for chaotic maps as 1/√T.

    Args:
        step: The map: from a state to the next one, a tensor or a tuple of tensors, by operations that
            ``torch.func`` differentiates; or a :class:`DifferentiableMap` such as :func:`update_map` gives. For a
            flow an integrator's step: ``rk4_step(field, dt)``.
        x0: The start.
        k: How many exponents, at most the number n of coordinates.
        num_steps: Steps that are averaged.
        burn_in: Steps before those, in which the state reaches its attractor and the frame its directions.
        dt: Time of one step.
        orthonormalize_every: Steps between orthonormalisations; more than one is right while the tangents stay
            independent: eps · exp((λ_1 − λ_k) · steps · dt) must be small.
        batched: x0 has a leading batch dimension, over which everything runs at once.
        window: ``"uniform"``, or ``"bump"``, the weights exp(−1/(s(1−s))) over the run: where the motion is periodic
            or quasi-periodic (linear maps with complex eigenvalues, limit cycles) the error then falls faster
            than any power of 1/T; for chaotic motion it makes the variance about 1.5 times larger.
            Das, Saiki, Sander & Yorke (2017), Nonlinearity 30:4111.
        frame: (k, n) or (batch, k, n), the first tangents, as rows; default random.
        generator: For the random frame.

    Returns:
        (k,) or (batch, k), largest first. A direction that a singular map collapses has exponent −∞: a growth below
        rounding (4 eps of the tangent's length) counts as zero.

    Raises:
        ValueError: k is not in 1..n, a count is out of range, or ``step`` is not a function of its input (two
            evaluations differ, or the input was written to).
        FloatingPointError: The state or a tangent is not finite, with the step at which it happened.

    >>> matrix = torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    >>> found = lyapunov_exponents(lambda x: matrix @ x, torch.ones(2).double(), k=2, num_steps=9, burn_in=50)
    >>> [f"{value:.6f}" for value in found.exp().tolist()]
    ['2.000000', '0.500000']
    """
    return lyapunov_spectrum(
        step,
        x0,
        k=k,
        num_steps=num_steps,
        burn_in=burn_in,
        dt=dt,
        orthonormalize_every=orthonormalize_every,
        batched=batched,
        window=window,
        frame=frame,
        generator=generator,
    ).exponents


@torch.no_grad()
def lyapunov_spectrum(
    step: Step | DifferentiableMap,
    x0: State,
    *,
    k: int | None = None,
    num_steps: int,
    burn_in: int = 0,
    dt: float = 1.0,
    orthonormalize_every: int = 1,
    batched: bool = False,
    window: str = "uniform",
    frame: Tensor | None = None,
    generator: torch.Generator | None = None,
    covariant: bool = False,
    burn_out: int | None = None,
) -> LyapunovSpectrum:
    """Like :func:`lyapunov_exponents`, with everything that was measured on the way.

    Args:
        step: As there.
        x0: As there.
        k: As there; None: the full spectrum.
        num_steps: As there.
        burn_in: As there.
        dt: As there.
        orthonormalize_every: As there.
        batched: As there.
        window: As there.
        frame: As there.
        generator: As there.
        covariant: Also return covariant directions, which the dynamics maps onto one another. All frames of
            the run are kept for that.
        burn_out: Steps after the run in which the covariant directions converge, backward in time; default num_steps.

    Raises:
        MemoryError: The frames that ``covariant=True`` keeps would not fit into memory.
        ValueError: As there.
        FloatingPointError: As there; also if a full spectrum's sum is not the mean log-determinant.
    """
    state: Vector = (x0,) if isinstance(x0, Tensor) else tuple(x0)
    differentiable = as_map(step, x0)
    run = _Run(differentiable, state, batched=batched, every=orthonormalize_every, steps=num_steps + burn_in)
    k = run.n if k is None else k
    _check_counts(k, run.n, num_steps, burn_in, orthonormalize_every, dt, window)
    run.check_function(state)
    rows = _first_frame(frame, run, k, generator)
    burn_out = num_steps if burn_out is None else burn_out
    windows = -(-num_steps // orthonormalize_every)
    extra = -(-burn_out // orthonormalize_every) if covariant else 0
    if covariant:
        _check_memory((windows + extra) * rows.numel() * rows.element_size())
    state = tuple(a.detach() for a in state)
    for _ in range(-(-burn_in // orthonormalize_every)):
        state, rows, _ = run.window(state, rows)
    factors: list[Tensor] = []
    frames: list[Tensor] = []
    determinants: list[Tensor] = []
    for _ in range(windows):
        state, rows, factor = run.window(state, rows)
        factors.append(factor if covariant else factor.diagonal(dim1=-2, dim2=-1))
        if run.determinant is not None and k == run.n:
            determinants.append(run.determinant)
        if covariant:
            frames.append(rows)
    end, last = state, rows
    directions = None
    diagonals = factors
    if covariant:
        for _ in range(extra):
            state, rows, factor = run.window(state, rows)
            factors.append(factor)
            frames.append(rows)
        directions = covariant_directions(torch.stack(frames), torch.stack(factors), extra)
        diagonals = [f.diagonal(dim1=-2, dim2=-1) for f in factors[:windows]]
    growth = torch.stack(diagonals).log()
    weights = window_weights(window, growth)
    time = dt * orthonormalize_every
    exponents = torch.einsum("t,t...->...", weights, growth) / time
    log_determinant = None
    if determinants:
        log_determinant = torch.einsum("t,t...->...", weights, torch.stack(determinants)) / time
        _check_sum(exponents.sum(-1), log_determinant, growth.dtype)
    order = exponents.argsort(dim=-1, descending=True, stable=True)
    if not bool((order == torch.arange(k, device=order.device)).all()):
        # Equal ones come in any order, and a short run may find a later one larger.
        exponents = exponents.gather(-1, order)
        growth = growth.gather(-1, order.expand_as(growth))
    return LyapunovSpectrum(
        exponents=exponents,
        growth=growth,
        window_time=time,
        state=end[0] if isinstance(x0, Tensor) else end,
        frame=last,
        covariant=directions,
        log_determinant=log_determinant,
        weights=weights,
    )


class _Run:
    """A state and its frame on their way, over one start point or a batch of them."""

    def __init__(
        self, differentiable: DifferentiableMap, x0: Vector, *, batched: bool, every: int, steps: int
    ) -> None:
        self._map, self._every, self._batch_dims = differentiable, every, int(batched)
        coordinates = differentiable.coordinates(x0)
        if not coordinates or any(not a.is_floating_point() for a in coordinates):
            raise ValueError(
                f"The state must be tensors of real floating-point numbers. Got {[a.dtype for a in x0]}; view "
                "complex ones as real (torch.view_as_real)."
            )
        self.like = coordinates
        self.batch = tuple(coordinates[0].shape[: self._batch_dims])
        self.n = sum(a.numel() for a in coordinates) // max(1, math.prod(self.batch))
        self.determinant: Tensor | None = None
        self._steps_done = 0
        self._records = steps >= _RECORD
        self._push = differentiable.push_batch if batched else differentiable.push
        self._step = torch.vmap(differentiable.step) if batched else differentiable.step

    def check_function(self, x: Vector) -> None:
        """Two evaluations must agree, and leave their input alone."""
        before = tuple(a.clone() for a in x)
        try:
            first, second = (tuple(a.clone() for a in self._step(before)) for _ in range(2))
        except RuntimeError as error:
            if "randomness" in str(error):
                raise ValueError(_NOT_A_FUNCTION.format("it draws random numbers")) from error
            raise
        if any(
            not torch.equal(a, b) and bool(torch.isfinite(a).all()) for a, b in zip(x, before, strict=True)
        ):
            raise ValueError(_NOT_A_FUNCTION.format("it writes to its input"))
        if [a.shape for a in first] != [a.shape for a in x]:
            raise ValueError(
                f"step must return a state of the shapes of its input. Got {[tuple(a.shape) for a in first]} from "
                f"{[tuple(a.shape) for a in x]}."
            )
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)):
            raise ValueError(_NOT_A_FUNCTION.format("two evaluations at the same state differ"))

    def window(self, x: Vector, rows: Tensor) -> tuple[Vector, Tensor, Tensor]:
        """``every`` steps, then an orthonormalisation."""
        frame = from_rows(rows, self.like, batch_dims=self._batch_dims)
        if self._records and self._steps_done == 0:
            self._push = recorded(self._push, x, frame)
        for _ in range(self._every):
            x, frame = self._push(x, frame)
            self._steps_done += 1
        pushed = to_rows(frame, batch_dims=self._batch_dims)
        # One test for both: a number that is not finite spoils the sum.
        if not math.isfinite(float(pushed.sum())) or not all(bool(torch.isfinite(a).all()) for a in x):
            raise FloatingPointError(
                f"The state and its tangents must stay finite. Got a number that is not after {self._steps_done} "
                "steps: the dynamics diverges; lower its step size, start elsewhere, or orthonormalise more often."
            )
        if pushed.shape[-2] == self.n <= _SELF_CHECK:
            self.determinant = torch.linalg.slogdet(pushed).logabsdet  # |det Q| = 1
        rows, factor = orthonormalize(pushed)
        return x, rows, factor


_NOT_A_FUNCTION = (
    "step must be a function of the state alone. Got one of which {}: turn dropout off or draw its masks before, keep "
    "batches fixed or make them part of the state, and put counters and running statistics into the state."
)


def _check_counts(k: int, n: int, num_steps: int, burn_in: int, every: int, dt: float, window: str) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..n, the number of coordinates of the state. Got k={k} and n={n}.")
    for name, value, least in (
        ("num_steps", num_steps, 1),
        ("burn_in", burn_in, 0),
        ("orthonormalize_every", every, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}. Got {value}.")
    if num_steps % every or burn_in % every:
        raise ValueError(
            f"num_steps and burn_in must be multiples of orthonormalize_every. Got {num_steps}, {burn_in} and {every}."
        )
    if not dt > 0:
        raise ValueError(f"dt must be positive. Got {dt}.")
    if window not in ("uniform", "bump"):
        raise ValueError(f"window must be 'uniform' or 'bump'. Got {window!r}.")


def _first_frame(frame: Tensor | None, run: _Run, k: int, generator: torch.Generator | None) -> Tensor:
    if frame is None:
        return random_frame(k, run.n, run.like[0], generator, run.batch)
    if frame.shape != (*run.batch, k, run.n):
        raise ValueError(
            f"frame must have shape {(*run.batch, k, run.n)}, one tangent per row. Got {tuple(frame.shape)}."
        )
    return orthonormalize(frame.to(run.like[0]))[0]


def _check_memory(needed: int) -> None:
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise MemoryError(
            f"covariant=True keeps every frame of the run: {needed / 2**30:.1f} GiB. Got a machine of "
            f"{available / 2**30:.1f} GiB; take fewer steps, fewer exponents, or a larger orthonormalize_every."
        )


def _check_sum(total: Tensor, log_determinant: Tensor, dtype: torch.dtype) -> None:
    finite = torch.isfinite(total) & torch.isfinite(log_determinant)
    scale = 1 + log_determinant.abs()
    wrong = finite & ((total - log_determinant).abs() > torch.finfo(dtype).eps ** 0.5 * scale)
    if bool(wrong.any()):
        raise FloatingPointError(
            "The exponents must add up to the mean log-determinant. Got "
            f"{total[wrong].tolist()} and {log_determinant[wrong].tolist()}: the tangents have become dependent within "
            "a window; lower orthonormalize_every or use float64."
        )
