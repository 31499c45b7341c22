"""Transforms: inverses, slopes, ranges, and what happens at their ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_nested.hyperparameters import Exp, Interval, Simplex, Softplus, Transform, Unconstrained

SCALAR: list[tuple[Transform, list[float]]] = [
    (Unconstrained(), [-3.0, 0.0, 5.0]),
    (Exp(), [1e-12, 1e-4, 1.0, 1e6]),
    (Softplus(), [1e-12, 0.1, 1.0, 700.0]),  # exp(700) is the end of float64: the inverse must not form it
    (Interval(), [1e-9, 0.5, 1 - 1e-9]),
    (Interval(lower=-2.0, upper=3.0), [-1.999, 0.0, 2.999]),
]


@pytest.mark.parametrize(("transform", "values"), SCALAR, ids=lambda p: repr(p)[:30])
def test_inverse_is_the_inverse(transform: Transform, values: list[float]) -> None:
    value = torch.tensor(values, dtype=torch.float64)
    raw = transform.inverse(value)
    assert raw.isfinite().all()
    # Near the upper end u of an interval the value is u − tiny: relative to u the last bit is what can be kept.
    torch.testing.assert_close(transform.forward(raw), value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("transform", "values"), SCALAR, ids=lambda p: repr(p)[:30])
def test_slopes_are_those_of_central_differences(transform: Transform, values: list[float]) -> None:
    raw = transform.inverse(torch.tensor(values[1:-1], dtype=torch.float64)).requires_grad_(True)
    assert torch.autograd.gradcheck(transform.forward, (raw,))


def test_the_simplex_sums_to_one_and_inverts() -> None:
    value = torch.tensor([[0.7, 0.2, 0.1], [1e-9, 0.5, 0.5 - 1e-9]], dtype=torch.float64)
    raw = Simplex().inverse(value)
    torch.testing.assert_close(raw.mean(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(Simplex().forward(raw), value, rtol=1e-13, atol=0)


def test_projection_clamps_to_the_stated_range() -> None:
    raw = torch.tensor([-1e3, 0.0, 1e3], dtype=torch.float64)
    exp = Exp(lower=1e-3, upper=10.0)
    exp.project_(raw)
    torch.testing.assert_close(exp.forward(raw), torch.tensor([1e-3, 1.0, 10.0], dtype=torch.float64))
    raw = torch.tensor([-1e3, 0.0, 1e3])
    Interval(limit=8.0).project_(raw)
    assert raw.tolist() == [-8.0, 0.0, 8.0]
    raw = torch.tensor([-1e3, 1e3])
    Softplus().project_(raw)
    Unconstrained().project_(raw)
    assert raw.tolist() == [-1e3, 1e3]


@pytest.mark.parametrize(
    ("transform", "value", "message"),
    [
        (Exp(), [1.0, 0.0], "positive. Got 0"),
        (Softplus(), [-1.0], "positive. Got -1"),
        (Interval(), [0.5, 1.0], r"inside \(0.0, 1.0\). Got 1"),
        (Simplex(), [0.5, 0.4], "sum 1 .* Got 0.9"),
        (Simplex(), [1.0, 0.0], "positive. Got 0"),
    ],
)
def test_values_outside_the_range_are_refused(transform: Transform, value: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transform.inverse(torch.tensor(value))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Exp(lower=0.0),
        lambda: Exp(lower=2.0, upper=1.0),
        lambda: Interval(lower=1.0, upper=1.0),
        lambda: Interval(limit=0.0),
    ],
)
def test_options_out_of_range_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match="Got"):
        make()


def test_transforms_are_values() -> None:
    def forward(transform: Transform) -> Tensor:
        return transform.forward(torch.zeros(()))

    assert Exp(upper=2.0) == Exp(upper=2.0)
    assert len({Exp(upper=2.0), Exp(upper=2.0), Exp(upper=3.0)}) == 2
    assert float(forward(Interval(upper=4.0))) == 2.0
