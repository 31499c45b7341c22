import math
from dataclasses import dataclass

import pytest

from lightning_nested.anneal import Anneal, annealed


def test_values() -> None:
    linear, cosine = Anneal(4.0, 1.0, 6), Anneal(4.0, 1.0, 6, "cosine")
    for step in range(7):
        assert linear.at(step) == pytest.approx(4.0 - 3.0 * step / 6, rel=1e-15)
        expected = 1.0 + 3.0 * math.cos(math.pi * step / 12) ** 2
        assert cosine.at(step) == pytest.approx(expected, rel=1e-15)
    for anneal in (linear, cosine):
        assert (anneal.at(0), anneal.at(6), anneal.at(1000)) == (4.0, 1.0, 1.0)


def test_fields_of_a_dataclass() -> None:
    @dataclass(frozen=True)
    class Options:
        weight: float | Anneal
        other: Anneal
        name: str = "x"

        def __post_init__(self) -> None:
            assert isinstance(self.other, Anneal)

    plain, moving = object(), Options(2.0, Anneal(1.0, 0.0, 2))
    assert annealed(plain, 3) is plain
    now = annealed(moving, 1)
    assert (now.weight, now.other, now.name) == (2.0, 0.5, "x")
    assert moving.other == Anneal(1.0, 0.0, 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ((1.0, 0.0, 0), "steps must be at least 1. Got 0"),
        ((1.0, float("nan"), 3), "end must be a finite number. Got nan"),
        ((1.0, 0.0, 3, "square"), "shape must be 'linear' or 'cosine'. Got 'square'"),
    ],
)
def test_wrong_arguments(options: tuple[float, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Anneal(*options)  # type: ignore[arg-type]
