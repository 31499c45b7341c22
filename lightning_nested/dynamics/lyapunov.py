"""Lyapunov exponents of a differentiable map: the mean logarithmic growth of small differences.

Benettin, Galgani, Giorgilli & Strelcyn (1980), Meccanica 15:9-30: push an orthonormal frame through the Jacobian,
orthonormalise it again, and average the logarithms of the diagonal of the triangular factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.dynamics.frames import covariant_directions, window_weights
from lightning_nested.dynamics.maps import DifferentiableMap, State, Step, as_map
from lightning_nested.dynamics.spectrum_run import SpectrumRun

_RECORD = 30  # steps from which on recording the map's operations pays


@dataclass(frozen=True, kw_only=True, eq=False)
class LyapunovSpectrum:
    """Result of :func:`lyapunov_spectrum`. Shapes lead with (batch,) where start points came in a batch.

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
        """(..., k), the standard error of the plain average, from the spread of up to 20 successive blocks.

        Blocks must be long against the correlation time; NaN for fewer than four windows. Too large along a periodic
        orbit, where the error falls as 1/T.
        """
        blocks = min(20, len(self.growth) // 2)
        if blocks < 2:
            return torch.full_like(self.exponents, math.nan)
        size = len(self.growth) // blocks
        means = self.local[: blocks * size].reshape(blocks, size, *self.exponents.shape).mean(1)
        error: Tensor = means.std(0) / blocks**0.5
        return error

    @property
    def angles(self) -> Tensor | None:
        """(T, ..., k, k), angles in [0, π/2] between covariant directions; near 0 growth and decay nearly align.

        A system whose angles stay away from 0 is hyperbolic: its exponents are robust to small changes of the map.
        """
        if self.covariant is None:
            return None
        return (self.covariant @ self.covariant.mT).abs().clamp(max=1.0).acos()

    @property
    def kaplan_yorke(self) -> Tensor:
        """(...,), the Kaplan–Yorke dimension of these exponents: see :func:`kaplan_yorke_dimension`."""
        return kaplan_yorke_dimension(self.exponents)


@checked
def kaplan_yorke_dimension(exponents: Tensor) -> Tensor:
    """Compute D = j + Σ_{i≤j} λ_i / |λ_{j+1}|, j the largest number of leading exponents with a sum ≥ 0.

    If the sum of all k given exponents is not negative, D = k, which is a lower bound.
    Kaplan & Yorke (1979), Lecture Notes in Mathematics 730:204-227.
    Exponents (..., k) come largest first.

    >>> float(kaplan_yorke_dimension(torch.tensor([0.5, 0.0, -1.0])))
    2.5
    """
    total = exponents.cumsum(-1)
    j = (total >= 0).long().cumprod(-1).sum(-1)
    before = torch.cat([torch.zeros_like(total[..., :1]), total], -1).gather(-1, j.unsqueeze(-1)).squeeze(-1)
    following = torch.cat([exponents, torch.full_like(exponents[..., :1], -math.inf)], -1)
    return j + before / following.gather(-1, j.unsqueeze(-1)).squeeze(-1).abs()


class SpectrumOptions(TypedDict, total=False):
    """Optional arguments of :func:`lyapunov_exponents` and :func:`lyapunov_spectrum`.

    Attributes:
        orthonormalize_every: Steps between orthonormalisations, by default 1; more is right while the tangents stay
            independent: eps · exp((λ_1 − λ_k) · steps · dt) must be small.
        batched: Give x0 a leading batch dimension, over which everything runs at once.
        window: ``"uniform"``, the default, or ``"bump"``, the weights exp(−1/(s(1−s))) over the run: where the motion
            is periodic or quasi-periodic (linear maps with complex eigenvalues, limit cycles) the error then falls
            faster than any power of 1/T; for chaotic motion it makes the variance about 1.5 times larger.
            Das, Saiki, Sander & Yorke (2017), Nonlinearity 30:4111.
        frame: (k, n) or (batch, k, n), the first tangents, as rows; random by default.
        generator: Generator of the random frame.
        compile: Compile the map's recorded operations, by default not: for small maps of many operations, such as an
            integrator's, a step is then up to ten times as fast, after some seconds. Needs a C++ compiler.
    """

    orthonormalize_every: int
    batched: bool
    window: Literal["uniform", "bump"]
    frame: Tensor | None
    generator: torch.Generator | None
    compile: bool


@checked
def lyapunov_exponents(
    step: Step | DifferentiableMap,
    x0: State,
    *,
    k: int,
    num_steps: int,
    burn_in: int = 0,
    dt: float = 1.0,
    **options: Unpack[SpectrumOptions],
) -> Tensor:
    """Compute the k largest Lyapunov exponents λ_i = lim (1/T) Σ_t log R_ii(t) of a map, in nats per unit time.

    k Jacobian-vector products a step; memory of k tangents. The average converges as 1/T, for chaotic maps as 1/√T.

    Args:
        step: The map: from a state to the next one, a tensor or a tuple of tensors, by operations that
            ``torch.func`` differentiates; or a :class:`DifferentiableMap` such as :func:`update_map` gives. For a
            flow an integrator's step: ``rk4_step(field, dt)``.
        x0: The initial state.
        k: Number of exponents, at most the number n of coordinates.
        num_steps: Steps that are averaged.
        burn_in: Steps before those, in which the state reaches its attractor and the frame its directions.
        dt: Time of one step.
        **options: Further options, see :class:`SpectrumOptions`.

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
    _refuse_unknown(options)
    return lyapunov_spectrum(step, x0, k=k, num_steps=num_steps, burn_in=burn_in, dt=dt, **options).exponents


@checked
@torch.no_grad()
def lyapunov_spectrum(
    step: Step | DifferentiableMap,
    x0: State,
    *,
    k: int | None = None,
    num_steps: int,
    burn_in: int = 0,
    dt: float = 1.0,
    covariant: bool = False,
    burn_out: int | None = None,
    **options: Unpack[SpectrumOptions],
) -> LyapunovSpectrum:
    """Compute Lyapunov exponents with their growth, frames and, if wanted, covariant directions.

    Arguments and errors of :func:`lyapunov_exponents`, with ``k=None`` for the full spectrum. ``covariant=True`` also
    returns covariant directions, which the dynamics maps onto one another. It keeps all frames of the run, and adds
    ``burn_out`` steps (default ``num_steps``) in which these directions converge, backward in time.

    Raises:
        MemoryError: The frames that ``covariant=True`` keeps would not fit into memory.
        FloatingPointError: Also if the sum of a full spectrum differs from the mean log-determinant.
    """
    _refuse_unknown(options)
    every, window = options.get("orthonormalize_every", 1), options.get("window", "uniform")
    at_least(0, burn_out=burn_out)
    run = SpectrumRun(as_map(step, x0), x0, batched=options.get("batched", False), every=every)
    k = run.n if k is None else k
    _check_counts(k, run.n, num_steps, burn_in, every, dt)
    run.check_function()
    run.begin(k, options.get("frame"), options.get("generator"), num_steps + burn_in >= _RECORD)
    if options.get("compile", False):
        run.compile()
    windows, extra = num_steps // every, -(-(num_steps if burn_out is None else burn_out) // every)
    if covariant:
        run.check_memory(windows + extra)
    run.measure(burn_in // every, keep=False)
    run.determinants.clear()
    growth = run.measure(windows, keep=covariant).log()
    state, rows, directions = run.state, run.rows, None
    if covariant:
        run.measure(extra, keep=True)
        directions = covariant_directions(torch.cat(run.frames), torch.cat(run.factors), extra)
    weights, time = window_weights(window, growth), dt * every
    exponents = torch.einsum("t,t...->...", weights, growth) / time
    log_determinant = None
    if run.determinants:
        determinants = torch.cat(run.determinants)[:windows]
        log_determinant = torch.einsum("t,t...->...", weights, determinants) / time
        _check_sum(exponents.sum(-1), log_determinant)
    # Equal exponents come in any order, and a short run may find a later one larger.
    exponents, order = exponents.sort(dim=-1, descending=True, stable=True)
    if directions is not None:
        directions = directions.gather(-2, order.unsqueeze(-1).expand_as(directions))
    return LyapunovSpectrum(
        exponents=exponents,
        growth=growth.gather(-1, order.expand_as(growth)),
        window_time=time,
        state=state[0] if isinstance(x0, Tensor) else state,
        frame=rows,
        covariant=directions,
        log_determinant=log_determinant,
        weights=weights,
    )


def _refuse_unknown(options: Mapping[str, object]) -> None:
    unknown = [name for name in options if name not in SpectrumOptions.__annotations__]
    if unknown:
        known = ", ".join(SpectrumOptions.__annotations__)
        raise TypeError(f"Options must be among {known}. Got an unexpected keyword argument {unknown[0]!r}.")


def _check_counts(k: int, n: int, num_steps: int, burn_in: int, every: int, dt: float) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..n, the number of coordinates of the state. Got k={k} and n={n}.")
    at_least(1, num_steps=num_steps, orthonormalize_every=every)
    at_least(0, burn_in=burn_in)
    if num_steps % every or burn_in % every:
        got = f"Got {num_steps}, {burn_in} and {every}."
        raise ValueError(f"num_steps and burn_in must be multiples of orthonormalize_every. {got}")
    positive(dt=dt)


def _check_sum(total: Tensor, log_determinant: Tensor) -> None:
    finite = torch.isfinite(total) & torch.isfinite(log_determinant)
    scale = 1 + log_determinant.abs()
    wrong = finite & ((total - log_determinant).abs() > torch.finfo(total.dtype).eps ** 0.5 * scale)
    if bool(wrong.any()):
        raise FloatingPointError(
            "The exponents must add up to the mean log-determinant. Got "
            f"{total[wrong].tolist()} and {log_determinant[wrong].tolist()}: the tangents have become dependent within "
            "a window; lower orthonormalize_every or use float64."
        )
