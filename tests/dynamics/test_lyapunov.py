"""Lyapunov exponents against known systems, sum rules, and the laws by which they converge."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nested.dynamics import (
    LyapunovSpectrum,
    kaplan_yorke_dimension,
    lyapunov_exponents,
    lyapunov_spectrum,
    rk4_step,
    spectrum_run,
)
from lightning_nested.dynamics.frames import orthonormalize
from tests.cases import DOUBLE
from tests.conftest import Normal


def point(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def logistic(r: float) -> Callable[[Tensor], Tensor]:
    return lambda x: r * x * (1 - x)


def henon(x: Tensor) -> Tensor:
    return torch.stack([1 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0]])


def cat(x: Tensor) -> Tensor:
    return torch.stack([2 * x[0] + x[1], x[0] + x[1]]).remainder(1.0)


def lorenz(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0]), x[0] * (28 - x[2]) - x[1], x[0] * x[1] - 8 / 3 * x[2]])


# --- the reference table


@pytest.mark.parametrize(("r", "exact"), [(2.5, math.log(0.5)), (3.2, math.log(abs(4 + 6.4 - 3.2**2)) / 2)])
def test_logistic_map_at_a_stable_orbit(r: float, exact: float) -> None:
    found = lyapunov_exponents(logistic(r), point(0.3), k=1, num_steps=10, burn_in=200)
    assert float(found) == pytest.approx(exact, abs=1e-12)


def test_logistic_map_in_chaos(generator: torch.Generator) -> None:
    x0 = torch.rand(200, 1, generator=generator, dtype=DOUBLE)
    found = lyapunov_spectrum(logistic(4.0), x0, k=1, num_steps=400, burn_in=20, batched=True)
    # Successive growths at r=4 are correlated so that T·mean − T·ln 2 stays of order one: std of a mean is about 3/T.
    assert float(found.exponents.mean()) == pytest.approx(math.log(2), abs=5 * 3 / 400 / 200**0.5)


def test_henon_map_and_its_sum(generator: torch.Generator) -> None:
    x0 = 0.1 * torch.rand(200, 2, generator=generator, dtype=DOUBLE)
    found = lyapunov_spectrum(henon, x0, num_steps=600, burn_in=60, batched=True)
    torch.testing.assert_close(found.exponents.sum(-1), point(math.log(0.3)).expand(200), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.exponents.mean(0), point(0.41922, -1.62319), rtol=0.01, atol=0)
    # The standard error of one run is the spread over runs, within the accuracy of 20 blocks and 200 runs.
    spread = found.exponents[:, 0].std()
    assert 0.5 < float(found.standard_error[:, 0].median() / spread) < 2.0
    # Kaplan & Yorke: 1 + .41922/1.62319.
    assert float(found.kaplan_yorke.mean()) == pytest.approx(1.25827, abs=0.01)


def test_arnold_cat() -> None:
    found = lyapunov_exponents(cat, point(0.2, 0.7), k=2, num_steps=100, burn_in=30)
    golden = math.log((3 + 5**0.5) / 2)
    torch.testing.assert_close(found, point(golden, -golden), rtol=0, atol=1e-10)


def test_lorenz_flow(generator: torch.Generator) -> None:
    step = rk4_step(lorenz, 0.02)
    x0 = torch.randn(3, 1500, generator=generator, dtype=DOUBLE) + point(0, 0, 25)[:, None]
    for _ in range(
        1500
    ):  # the field takes a batch in its last dimension: onto the attractor without tangents
        x0 = step(x0)
    options: dict[str, Any] = {"dt": 0.02, "batched": True, "orthonormalize_every": 10}
    found = lyapunov_spectrum(step, x0.mT, num_steps=400, burn_in=300, **options)
    mean = found.exponents.mean(0)  # of 12 000 units of time: a standard error of 0.005
    torch.testing.assert_close(mean[[0, 2]], point(0.9056, -14.5723), rtol=0.01, atol=0)
    assert abs(float(mean[1])) < 0.01


def test_lorenz_sum_is_the_divergence_of_the_field() -> None:
    # The rule holds for the flow: a step so short that Runge and Kutta's own error (1.2e-8 at 1e-3, order 4) is gone.
    x0 = point(1.0, 2.0, 25.0)
    found = lyapunov_exponents(rk4_step(lorenz, 1e-4), x0, k=3, num_steps=50, dt=1e-4)
    assert float(found.sum()) == pytest.approx(-41 / 3, abs=1e-10)


def test_linear_map(normal: Normal) -> None:
    basis = normal(5, 5)
    eigenvalues = point(1.6, -1.1, 0.7, 0.4, -0.2)
    matrix = basis @ eigenvalues.diag() @ basis.inverse()
    found = lyapunov_exponents(lambda x: matrix @ x, normal(5), k=5, num_steps=20, burn_in=100)
    torch.testing.assert_close(found, eigenvalues.abs().log(), rtol=0, atol=1e-10)


def test_a_bump_window_resolves_complex_eigenvalues(normal: Normal) -> None:
    def turn(radius: float, angle: float) -> Tensor:
        c, s = radius * math.cos(angle), radius * math.sin(angle)
        return torch.tensor([[c, -s], [s, c]], dtype=DOUBLE)

    basis = torch.eye(4, dtype=DOUBLE) + 0.3 * normal(4, 4)
    matrix = basis @ torch.block_diag(turn(0.9, 1.0), turn(0.5, 2.4)) @ basis.inverse()  # type: ignore[no-untyped-call]
    exact = torch.linalg.eigvals(matrix).abs().log().sort(descending=True).values

    def error(window: str, steps: int) -> float:
        found = lyapunov_exponents(
            lambda x: matrix @ x, 1e-9 * normal(4), k=4, num_steps=steps, burn_in=200, window=window
        )
        return float((found - exact).abs().max())

    assert error("bump", 2000) < 1e-10
    assert error("uniform", 600) > 1e-5


def test_gradient_descent_on_a_quadratic(normal: Normal) -> None:
    curvature = point(0.1, 1.0, 3.0)
    step = lambda w: w - 0.2 * torch.func.grad(lambda v: 0.5 * (curvature * v * v).sum())(w)  # noqa: E731
    found = lyapunov_exponents(step, normal(3), k=3, num_steps=20, burn_in=300)
    torch.testing.assert_close(found, (1 - 0.2 * curvature).abs().log(), rtol=0, atol=1e-10)


def test_simultaneous_gradient_on_a_bilinear_game() -> None:
    def step(players: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = players
        return x - 0.1 * y, y + 0.1 * x

    found = lyapunov_exponents(step, (point(1.0), point(0.5)), k=2, num_steps=30)
    torch.testing.assert_close(found, point(0.0049751654, 0.0049751654), rtol=0, atol=1e-10)


# --- laws


def test_the_error_falls_as_one_over_the_time(normal: Normal) -> None:
    """A frame that is not aligned yet: its growth falls short by a constant, so the mean errs by a constant over T."""
    matrix = point(1.5, 0.5).diag()
    frame = point(0.6, 0.8).view(1, 2)
    errors = [
        float(lyapunov_exponents(lambda x: matrix @ x, normal(2), k=1, num_steps=n, frame=frame))
        - math.log(1.5)
        for n in (100, 200, 400)
    ]
    assert errors[0] == pytest.approx(math.log(0.6) / 100, rel=1e-10)
    assert errors[0] / errors[1] == pytest.approx(2, rel=1e-9)
    assert errors[1] / errors[2] == pytest.approx(2, rel=1e-9)


def test_a_partial_spectrum_is_the_beginning_of_the_full_one(normal: Normal) -> None:
    frame, x0 = normal(2, 2), 0.1 * normal(2)
    options: dict[str, Any] = {"num_steps": 300, "burn_in": 20}
    full = lyapunov_exponents(henon, x0, k=2, frame=frame, **options)
    partial = lyapunov_exponents(henon, x0, k=1, frame=frame[:1], **options)
    torch.testing.assert_close(partial, full[:1], rtol=1e-6, atol=0)  # 320 steps of chaos amplify rounding
    spaced = lyapunov_exponents(henon, x0, k=2, frame=frame, orthonormalize_every=5, **options)
    torch.testing.assert_close(spaced, full, rtol=1e-6, atol=0)


def test_a_batch_is_its_members_and_a_tuple_is_its_tensor(normal: Normal) -> None:
    x0, frames = 0.1 * normal(3, 2), normal(3, 2, 2)
    together = lyapunov_spectrum(henon, x0, num_steps=8, batched=True, frame=frames)
    one = lyapunov_spectrum(henon, x0[1], num_steps=8, frame=frames[1])
    torch.testing.assert_close(together.exponents[1], one.exponents)
    torch.testing.assert_close(together.state[1], one.state)

    def split(x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return tuple(henon(torch.stack(x)))  # type: ignore[return-value]

    parts = lyapunov_spectrum(split, (x0[1, 0], x0[1, 1]), num_steps=8, frame=frames[1])
    torch.testing.assert_close(parts.exponents, one.exponents)
    assert isinstance(parts.state, tuple)


def test_running_and_local_exponents_end_at_the_exponents(normal: Normal) -> None:
    found = lyapunov_spectrum(henon, 0.1 * normal(2), num_steps=200, burn_in=10)
    torch.testing.assert_close(found.running[-1], found.exponents)
    torch.testing.assert_close(found.local.mean(0), found.exponents)
    assert found.log_determinant is not None
    torch.testing.assert_close(found.log_determinant, point(0.3).log()[0], rtol=0, atol=1e-12)


def test_covariant_directions_are_mapped_onto_one_another(normal: Normal) -> None:
    x0 = 0.1 * normal(2)
    found = lyapunov_spectrum(henon, x0, num_steps=40, burn_in=60, covariant=True, burn_out=60)
    assert found.covariant is not None
    x = lyapunov_spectrum(henon, x0, num_steps=61, burn_in=0).state  # where the first window ends
    assert isinstance(x, Tensor)
    for now, then in zip(found.covariant[:20], found.covariant[1:21], strict=True):
        pushed = now @ torch.func.jacrev(henon)(x).mT
        cosine = torch.nn.functional.cosine_similarity(pushed, then, dim=-1)
        torch.testing.assert_close(cosine.abs(), point(1.0, 1.0), rtol=0, atol=1e-9)
        x = henon(x)


def test_covariant_directions_of_a_linear_map_are_its_eigenvectors() -> None:
    matrix = point(2.0, 1.0, 0.0, 0.5).view(2, 2)
    found = lyapunov_spectrum(
        lambda x: matrix @ x, point(0, 0), num_steps=5, burn_in=60, covariant=True, burn_out=60
    )
    assert found.covariant is not None
    expected = torch.stack([point(1, 0), point(-2, 3) / 13**0.5])
    torch.testing.assert_close(found.covariant[0].abs(), expected.abs(), rtol=0, atol=1e-12)


def test_angles_of_a_linear_map_are_those_of_its_eigenvectors() -> None:
    matrix = point(2.0, 1.0, 0.0, 0.5).view(2, 2)
    found = lyapunov_spectrum(
        lambda x: matrix @ x, point(0, 0), num_steps=5, burn_in=60, covariant=True, burn_out=60
    )
    assert found.angles is not None
    angle = math.acos(2 / 13**0.5)  # between (1, 0) and (−2, 3)
    expected = point(0, angle, angle, 0).view(2, 2).expand(5, 2, 2)
    torch.testing.assert_close(found.angles, expected, rtol=0, atol=3e-8)  # acos near 1
    assert lyapunov_spectrum(lambda x: matrix @ x, point(0, 0), num_steps=5).angles is None


def test_the_neutral_covariant_direction_of_a_flow_is_its_velocity() -> None:
    """Of Lorenz's three directions the second has exponent 0; none of the orthonormal frame's does that."""
    step = rk4_step(lorenz, 0.02)
    options: dict[str, Any] = {"dt": 0.02, "covariant": True, "burn_out": 500}
    draw = torch.Generator().manual_seed(0)
    found = lyapunov_spectrum(
        step, point(1.0, 2.0, 25.0), num_steps=2, burn_in=300, generator=draw, **options
    )
    assert found.covariant is not None
    velocity = lorenz(found.state)  # type: ignore[arg-type]
    cosine = torch.nn.functional.cosine_similarity(found.covariant[-1], velocity.unsqueeze(0), dim=-1).abs()
    # Backward in time the angle shrinks by e^(−(λ₁−λ₂)t) = e^(−0.9·10); the step's own error is of order dt⁴.
    assert float(1 - cosine[1]) < 1e-6
    assert float(cosine[0]) < 0.999
    assert float(cosine[2]) < 0.999


@pytest.mark.parametrize("every", [1, 3])
def test_many_windows_at_once_are_the_same_as_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Signs are set for 64 windows together; a map that mirrors has all of them."""

    def mirrored(x: Tensor) -> Tensor:
        return torch.stack([1 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0], -0.7 * x[2] + 0.1 * x[0]])

    def run() -> LyapunovSpectrum:
        options: dict[str, Any] = {"covariant": True, "orthonormalize_every": every}
        draw = torch.Generator().manual_seed(3)
        return lyapunov_spectrum(
            mirrored, point(0.1, 0.1, 0.1), num_steps=150, burn_in=9, generator=draw, burn_out=30, **options
        )

    together = run()
    monkeypatch.setattr(spectrum_run, "_TOGETHER", 1)
    for name, alone in vars(run()).items():
        if isinstance(alone, Tensor):
            torch.testing.assert_close(getattr(together, name), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_compiled_map_is_the_same() -> None:
    options: dict[str, Any] = {"k": 2, "num_steps": 200, "frame": torch.eye(2, dtype=DOUBLE)}
    plain = lyapunov_exponents(henon, point(0.1, 0.1), **options)
    compiled = lyapunov_exponents(henon, point(0.1, 0.1), compile=True, **options)
    # Rounding grows by e^(0.42 t): after 85 steps the orbits are two orbits of one attractor.
    torch.testing.assert_close(compiled, plain, rtol=0, atol=0.1)
    short = lyapunov_exponents(henon, point(0.1, 0.1), compile=True, **(options | {"num_steps": 30}))
    expected = lyapunov_exponents(henon, point(0.1, 0.1), **(options | {"num_steps": 30}))
    torch.testing.assert_close(short, expected, rtol=0, atol=1e-8)


def test_a_map_that_cannot_be_recorded_cannot_be_compiled() -> None:
    def branches(x: Tensor) -> Tensor:
        return 0.5 * x if float(x.sum()) > 0 else 0.25 * x

    with pytest.raises(ValueError, match="compile=True needs a map whose operations can be recorded"):
        lyapunov_exponents(branches, point(1.0), k=1, num_steps=40, compile=True)


def test_kaplan_yorke_dimension() -> None:
    assert float(kaplan_yorke_dimension(point(0.9056, 0.0, -14.5723))) == pytest.approx(2.06214, abs=1e-5)
    assert float(kaplan_yorke_dimension(point(-0.1, -0.2))) == 0.0
    assert (
        float(kaplan_yorke_dimension(point(0.3, -0.1))) == 2.0
    )  # a lower bound: k exponents do not bring the sum below 0
    assert kaplan_yorke_dimension(torch.zeros(3, 2).double()).shape == (3,)


# --- frames


@pytest.mark.parametrize("condition", [1e0, 1e3, 1e9])
def test_tall_frames_take_cholesky_or_fall_back(normal: Normal, condition: float) -> None:
    rows = normal(4, 5000)
    rows[1:] = rows[:1] + rows[1:] / condition
    q, lower = orthonormalize(rows)
    torch.testing.assert_close(q @ q.mT, torch.eye(4, dtype=DOUBLE), rtol=0, atol=1e-14)
    torch.testing.assert_close(lower @ q, rows, rtol=0, atol=1e-11)
    _, reference = torch.linalg.qr(rows.mT)
    torch.testing.assert_close(lower.diagonal(), reference.diagonal().abs(), rtol=1e-14 * condition, atol=0)


# --- what cannot be right


def test_a_singular_map_has_exponents_of_minus_infinity(normal: Normal) -> None:
    # Of rank one in a basis that is no coordinate axis: what is left of the second tangent is rounding.
    u, v = normal(3), normal(3)
    matrix = torch.outer(u, v) / (u @ v) * 1.5
    found = lyapunov_exponents(lambda x: matrix @ x, normal(3), k=3, num_steps=5, burn_in=3)
    assert float(found[0]) == pytest.approx(math.log(1.5), abs=1e-12)
    assert found[1:].tolist() == [-math.inf, -math.inf]
    superstable = lyapunov_exponents(logistic(2.0), point(0.5), k=1, num_steps=5)
    assert superstable.tolist() == [-math.inf]


def test_maps_that_are_no_function_of_the_state_are_refused() -> None:
    dropout = nn.Dropout(0.5).train()
    with pytest.raises(ValueError, match="two evaluations at the same state differ: turn dropout off"):
        lyapunov_exponents(dropout, torch.ones(50), k=1, num_steps=3)
    with pytest.raises(ValueError, match="it draws random numbers"):
        lyapunov_exponents(dropout, torch.ones(2, 50), k=1, num_steps=3, batched=True)
    with pytest.raises(ValueError, match="writes to its input"):
        lyapunov_exponents(lambda x: x.mul_(0.5), torch.ones(3), k=1, num_steps=3)
    count = iter(range(10**6))
    with pytest.raises(ValueError, match="counters"):
        lyapunov_exponents(lambda x: x * next(count), torch.ones(3), k=1, num_steps=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 3}, "k=3 and n=2"),
        ({"k": 0}, "k=0"),
        ({"num_steps": 0}, "num_steps must be at least 1. Got 0"),
        ({"burn_in": -1}, "burn_in must be at least 0. Got -1"),
        ({"num_steps": 5, "orthonormalize_every": 2}, "multiples of orthonormalize_every"),
        ({"dt": 0.0}, "dt must be positive"),
        ({"window": "hann"}, "'uniform' or 'bump'. Got 'hann'"),
        ({"frame": torch.zeros(2, 3)}, r"shape \(1, 2\), one tangent per row. Got \(2, 3\)"),
        ({"step": lambda x: x[:1]}, "shapes of its input"),
        ({"x0": torch.zeros(2, dtype=torch.complex64)}, "view_as_real"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"step": henon, "x0": point(0.1, 0.1), "k": 1, "num_steps": 4, **change}
    with pytest.raises(ValueError, match=message):
        lyapunov_exponents(**arguments)


def test_diverging_dynamics_say_when() -> None:
    with pytest.raises(FloatingPointError, match=r"after \d+ steps"):
        lyapunov_exponents(lambda x: x**2, point(2.0), k=1, num_steps=100)


def test_frames_beyond_memory_are_refused() -> None:
    with pytest.raises(MemoryError, match="covariant=True keeps every frame"):
        lyapunov_spectrum(henon, point(0.1, 0.1), num_steps=10**12, covariant=True, burn_out=0)


@pytest.mark.parametrize("function", [lyapunov_exponents, lyapunov_spectrum])
def test_misspelt_options_are_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'orthonormalise_every'"):
        function(logistic(3.2), point(0.3), k=1, num_steps=4, orthonormalise_every=2)


def test_options_of_the_spectrum_are_none_of_the_exponents() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'covariant'"):
        lyapunov_exponents(logistic(3.2), point(0.3), k=1, num_steps=4, covariant=True)  # type: ignore[call-arg]


def test_a_flow_of_several_tensors_may_return_its_velocity_as_a_list() -> None:
    step = rk4_step(lambda x: [x[1], -x[0]], 0.1)  # type: ignore[index]
    x, v = step((point(1.0), point(0.0)))
    torch.testing.assert_close(torch.cat([x, v]), point(math.cos(0.1), -math.sin(0.1)), rtol=0, atol=1e-7)


def test_directions_are_in_the_order_of_the_exponents() -> None:
    """The frame's first direction shrinks, and a run this short does not turn it."""
    matrix = torch.diag(point(0.5, 2.0))
    found = lyapunov_spectrum(
        lambda x: matrix @ x,
        point(0, 0),
        num_steps=1,
        burn_in=0,
        frame=torch.eye(2, dtype=torch.float64),
        covariant=True,
        burn_out=1,
    )
    assert found.covariant is not None
    torch.testing.assert_close(found.exponents, point(2.0, 0.5).log())
    torch.testing.assert_close(found.covariant[0].abs(), torch.eye(2, dtype=torch.float64).flip(0))
