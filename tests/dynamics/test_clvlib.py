"""Exponents and covariant directions of the Lorenz flow against clvlib 0.1.5 on the example of its README.

x₀ = (8, 0, 30), Runge-Kutta steps of 0.01, first frame the identity. Its tutorial prints the exponents after 40 units
of time. Here they are compared sooner: rounding grows by e^0.9 in each unit, so that after 35 no digit is shared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nested.dynamics import lyapunov_spectrum, rk4_step
from tests.cases import DOUBLE

START = torch.tensor([8.0, 0.0, 30.0], dtype=DOUBLE)
EXAMPLE: dict[str, Any] = {"dt": 0.01, "frame": torch.eye(3, dtype=DOUBLE)}
# LE_history of clvlib after ¼, 2, 10 and 20 units of time
EXPONENTS = {
    25: (-2.78835971, -4.96413487, -5.91409773),
    200: (0.64408174, -0.47328729, -13.83734111),
    1000: (0.79702373, -0.07945314, -14.38413197),
    2000: (0.895638, -0.06654113, -14.49565803),
}
# arccos |cos| of its clv_history at index 500 and 1000: directions (1, 2), (1, 3) and (2, 3). Its coefficients in the
# frame lag by one step: its second direction is off the velocity by up to 0.1, and angles are those one step earlier.
ANGLES = {500: (1.21674930, 1.31551656, 1.29596800), 1000: (1.08401402, 1.47726914, 1.05998905)}


def lorenz(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0]), x[0] * (28 - x[2]) - x[1], x[0] * x[1] - 8 / 3 * x[2]])


def test_exponents_of_the_lorenz_flow_are_those_of_clvlib() -> None:
    found = lyapunov_spectrum(rk4_step(lorenz, 0.01), START, num_steps=25, **EXAMPLE)
    torch.testing.assert_close(found.exponents, torch.tensor(EXPONENTS[25], dtype=DOUBLE), rtol=0, atol=1e-8)


@pytest.mark.slow
def test_angles_of_covariant_directions_are_those_of_clvlib() -> None:
    found = lyapunov_spectrum(
        rk4_step(lorenz, 0.01), START, num_steps=2000, covariant=True, burn_out=1000, **EXAMPLE
    )
    for steps, expected in EXPONENTS.items():
        # The state has the other one's rounding, 1e-16, times e^(0.9 · 20).
        torch.testing.assert_close(
            found.running[steps - 1], torch.tensor(expected, dtype=DOUBLE), rtol=0, atol=2e-7
        )
    assert found.angles is not None
    for steps, values in ANGLES.items():
        one, two, _ = found.angles[steps - 2].unbind(0)
        pairs = torch.stack([one[1], one[2], two[2]])
        # Directions converge backward in time as e^(-0.9 · 10).
        torch.testing.assert_close(pairs, torch.tensor(values, dtype=DOUBLE), rtol=0, atol=5e-5)
    # As in its histogram: growth and neutral direction nearly align at times, the contracting one stays apart.
    middle = found.angles[998:1999]
    assert float(middle[:, 0, 1].min()) == pytest.approx(0.065087, abs=1e-5)
    assert float(middle[:, :2, 2].min()) == pytest.approx(0.448900, abs=1e-5)
    quartiles = middle[:, 0, 1].quantile(torch.tensor([0.25, 0.5, 0.75], dtype=DOUBLE))
    torch.testing.assert_close(
        quartiles, torch.tensor([0.30603, 0.59130, 1.01068], dtype=DOUBLE), rtol=0, atol=1e-4
    )
